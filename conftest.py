"""What needs a package that is not installed everywhere is not collected: its doctests would import it."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["src/sparsegate/moe/kernels/triton"]
