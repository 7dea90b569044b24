"""The embedded main job: real adapters of a real encoder, merged and measured on real test rows."""
