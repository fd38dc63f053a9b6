"""In a Jupyter or Colab notebook, pictures appear below the cell."""
import sys
from collections.abc import Iterable
from pathlib import Path


def show(pictures: Iterable[Path]) -> None:
    """Display PNG files where a notebook is watching; elsewhere do nothing."""
    ipython = sys.modules.get('IPython')
    shell = ipython and ipython.get_ipython()
    if shell and hasattr(shell, 'kernel'):  # a notebook's, not a terminal's
        from IPython.display import Image, display
        for picture in pictures:
            display(Image(filename=str(picture)))
