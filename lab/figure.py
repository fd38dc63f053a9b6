"""A figure with its title: nothing in a user's matplotlib settings or in a folder's name can break or clip it."""
import io
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from lab.files import write_atomically

# Okabe and Ito's colours, which colour-blind readers tell apart; grey for their yellow, too pale on white.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000', '#999999')
INK = '#444444'
FONTS = ('Noto Sans CJK SC', 'Source Han Sans SC', 'WenQuanYi Micro Hei', 'Microsoft YaHei', 'PingFang SC',
         'Hiragino Sans GB', 'Yu Gothic', 'Malgun Gothic', 'Noto Sans', 'Arial Unicode MS')  # where installed
STYLE = {
    'text.usetex': False, 'text.parse_math': False, 'font.size': 10, 'figure.dpi': 110, 'savefig.dpi': 110,
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': '#888888', 'axes.axisbelow': True,
    'axes.grid': True, 'grid.color': '#e6e6e6', 'axes.titlesize': 11, 'axes.titlelocation': 'left',
    'xtick.color': '#888888', 'ytick.color': '#888888', 'xtick.labelcolor': 'black', 'ytick.labelcolor': 'black',
    'legend.frameon': False, 'legend.fontsize': 9, 'lines.linewidth': 1.6, 'errorbar.capsize': 2.5}


class Title(NamedTuple):
    """What stands above a picture, each part on lines of its own."""
    question: str  # in words: 'Q2a: what does batch norm change?'
    data: str = ''  # where the images come from and how many there are
    changed: str = ''  # what the command line changed


@contextmanager
def own_style() -> Iterator[None]:
    """The project's settings instead of the user's; a character that no font has becomes a box, not an error."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from')
        warnings.filterwarnings('ignore', '.*Matplotlib currently does not support')  # scripts of joined letters
        matplotlib.rcdefaults()
        here = set(font_manager.fontManager.get_font_names())
        matplotlib.rcParams.update(STYLE | {'font.family': ['DejaVu Sans', *(font for font in FONTS if font in here)]})
        yield


def printable(text: str) -> str:
    """With `?` for bytes of a file name that are no text: matplotlib refuses them."""
    return text.encode(errors='replace').decode()


def new_figure(width: float, height: float, title: Title | str) -> Figure:
    """`width` x `height` inches, and above them the title, wrapped to the width; the layout keeps out of it."""
    figure = Figure(figsize=(width, height))
    renderer = FigureCanvasAgg(figure).get_renderer()
    margin, top, texts = 0.12, 0.1, []
    looks = (dict(fontsize=13, fontweight='bold'), dict(fontsize=9.5, color=INK), dict(fontsize=9.5, color='#777777'))
    for words, look in zip(Title(title) if isinstance(title, str) else title, looks, strict=False):
        for paragraph in filter(str.strip, printable(words).splitlines()):
            text = figure.text(0, 0, paragraph, va='top', linespacing=1.3, **look)
            _wrap(text, renderer, figure.dpi * (width - 2 * margin))
            texts.append((text, top))
            top += text.get_window_extent(renderer).height / figure.dpi + 0.06
    figure.set_size_inches(width, height + top)
    for text, y in texts:
        text.set_position((margin / width, 1 - y / (height + top)))
    figure.set_layout_engine('constrained', rect=(0, 0, 1, height / (height + top)), w_pad=0.08, h_pad=0.06)
    return figure


def _wrap(text: Text, renderer: RendererAgg, pixels: float) -> None:
    """Break a text's lines so that none is wider, a word only where it alone is too long."""
    def widest(lines: list[str]) -> float:
        return max(renderer.get_text_width_height_descent(line, text.get_fontproperties(), False)[0] for line in lines)
    words, lines = text.get_text(), [text.get_text()]
    characters = len(words)
    while characters > 1 and (width := widest(lines)) > pixels:
        characters = max(1, min(characters - 1, int(characters * pixels / width)))
        lines = textwrap.wrap(words, characters, break_on_hyphens=False)
    text.set_text('\n'.join(lines))


@own_style()
def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all; returns the path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    if buffer.tell() > 150_000:  # photographs, or very many lines: 256 colours are a third of the size
        few = Image.open(buffer).convert('RGB').quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(buffer := io.BytesIO(), 'PNG')
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)
