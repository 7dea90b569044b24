"""The report of a merge: one HTML file that needs nothing else, and the model card.

Both are made from the files that a merge leaves in its output folder, so they can be made again on a machine
that has neither the adapters nor the base model.
"""

from .card import card
from .page import page
from .record import Record, read_record
from .write import write_report

__all__ = ["Record", "card", "page", "read_record", "write_report"]
