"""Front door of the Triton programs, which live in the top-level folder ``kernels``.

Installed, the programs stand in ``nsc_fast/kernels``; in a checkout (also an editable install) they stand
in ``../kernels``. Either way they are imported by their long name, ``nsc_fast.kernels.project`` for
example. The folder has no ``__init__.py``: transformers probes for a package called ``kernels`` and would
take ours for it. Importing this module does not import triton.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_installed, _checkout = _here / "kernels", _here.parent / "kernels"

__path__ = [str(_installed if _installed.is_dir() else _checkout)]
