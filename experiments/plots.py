"""What the figures of this folder share."""
from model import InputError


def import_pyplot():
    """matplotlib.pyplot. Raises InputError if matplotlib, an optional package, is missing."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("figures need matplotlib: pip install -e '.[experiments]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot
