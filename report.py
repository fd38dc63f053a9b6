#!/usr/bin/env python3
"""Run every experiment of both scripts and fill their tables and pictures into REPORT.md.

    python report.py --data FOLDER --weights FILE    # every question as the assignment has it, three seeds
    python report.py --scale cpu                     # fewer images and epochs, and said so everywhere

The same command continues what was interrupted. What stands in REPORT.md between `<!-- Q1: SCALE -->` and
`<!-- end -->` is replaced by what part Q1 gave; summaries and pictures are kept in `report/`. The sentences around it
stay as they are: they speak of the run that was published, and are for you to rewrite.
"""
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import tyro

import ex3_convnet
import ex3_pretrained
from experiment import Result, markdown_table, read_summary, summary_table
from training import duration
from utils import write_atomically

HERE = Path(__file__).parent


class Part(NamedTuple):
    """One experiment of the report."""
    script: ModuleType
    experiment: str
    pictures: tuple[str, ...]
    cpu: str  # options of the reduced version; '' where a CPU manages the whole


NARROW = '--hidden-size 16 64 64 64 64 --num-validation 5000 --num-training 10000'  # an eighth of the filters
PARTS = {  # in the order in which they run
    'Q1': Part(ex3_convnet, 'Q1', ('curves', 'filters'), '--num-training 10000 --num-epochs 10'),
    'Q2a': Part(ex3_convnet, 'Q2a', ('curves',), '--num-training 10000 --num-epochs 10'),
    'Q2b': Part(ex3_convnet, 'Q2b', ('curves', 'best_against_latest'), f'{NARROW} --num-epochs 50'),
    'Q4a': Part(ex3_pretrained, 'Q4a', ('curves',), ''),
    'Q4b': Part(ex3_pretrained, 'Q4b', ('curves', 'accuracy', 'filters'), '--num-epochs 6'),
    'Q4-best': Part(ex3_pretrained, 'best', ('curves',), '--num-epochs 3'),
    'best': Part(ex3_convnet, 'best', ('curves',), '--hidden-size 32 128 128 128 128 --num-epochs 15'),
    'ingredients': Part(ex3_convnet, 'ingredients', ('accuracy',), f'{NARROW} --num-epochs 20'),
    'Q3a': Part(ex3_convnet, 'Q3a', ('accuracy', 'gallery'), f'{NARROW} --num-epochs 20'),
    'Q3a-strength': Part(ex3_convnet, 'Q3a-strength', ('accuracy',), f'{NARROW} --num-epochs 20'),
    'Q3b': Part(ex3_convnet, 'Q3b', ('dropout',), f'{NARROW} --num-epochs 20'),
}


@dataclass(frozen=True)
class Options:
    """Run every experiment of both scripts and fill REPORT.md."""
    scale: Literal['full', 'cpu'] = 'full'  # cpu: fewer images, epochs or filters, see PARTS
    parts: tuple[str, ...] = tuple(PARTS)  # which parts
    seeds: tuple[int, ...] | None = None  # repetitions, once all parts have run; None: 0 1 2, with cpu none
    data: str = 'auto'  # as in the scripts
    weights: str = 'imagenet'  # as in ex3_pretrained.py
    results: Path = HERE / 'results'
    report: Path = HERE / 'REPORT.md'


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not finished and fill the report; returns 0, or the worst exit status of a part.

    A part of status 1 lacks some of its runs (no weights, say), and the others go on. Any other ends the report.
    """
    options = tyro.cli(Options, args=argv, prog='report.py')
    if unknown := [name for name in options.parts if name not in PARTS]:
        print(f'report: error: parts must be of {", ".join(PARTS)}; got {unknown[0]!r}', file=sys.stderr)
        return 2
    more = ((0, 1, 2) if options.scale == 'full' else ()) if options.seeds is None else options.seeds
    statuses = [0]
    for seeds in [(), more] if more else [()]:  # the scripts' own first, so that all parts are there early
        for name in options.parts:
            statuses.append(run(PARTS[name], options, seeds))
            if statuses[-1] > 1:
                return statuses[-1]
            collect(name, options)
            text = options.report.read_text(encoding='utf-8')
            text = fill(text, options.report.parent / 'report', {name: options.scale})
            write_atomically(options.report, text)
    return max(statuses)


# --- running ------------------------------------------------------------------------------------------------


def arguments(part: Part, scale: str, seeds: Sequence[int]) -> list[str]:
    """The command line of a part, but for its data, weights and results."""
    return ['--experiment', part.experiment, *(part.cpu.split() if scale == 'cpu' else []),
            *(['--seeds', *map(str, seeds)] if seeds else [])]


def results_of(part: Part, options: Options) -> Path:
    """The folder in which a part's experiments lie."""
    return options.results / f'report-{options.scale}' / part.script.__name__


def run(part: Part, options: Options, seeds: Sequence[int]) -> int:
    """Run one part, with these seeds or the script's own -> its exit status."""
    weights = ['--weights', options.weights] if part.script is ex3_pretrained else []
    return part.script.main([*arguments(part, options.scale, seeds), '--data', options.data, *weights,
                             '--results', str(results_of(part, options).parent)])


def collect(name: str, options: Options) -> None:
    """Copy a part's summary and pictures into the folder `report` beside the report."""
    part, target = PARTS[name], options.report.parent / 'report'
    summaries = [path for path in results_of(part, options).glob('*/summary.csv')
                 if re.fullmatch(rf'{part.experiment}(-[0-9]+)?', path.parent.name)]
    newest = max(summaries, key=lambda path: path.stat().st_mtime).parent  # edited constants begin a new folder
    target.mkdir(exist_ok=True)
    shutil.copyfile(newest / 'summary.csv', target / f'{name}.csv')
    for picture in part.pictures:
        made, published = newest / f'{picture}.png', target / f'{name}-{picture}.png'
        if made.exists():
            shutil.copyfile(made, published)
        else:  # no run could be done
            published.unlink(missing_ok=True)


# --- writing ------------------------------------------------------------------------------------------------


def fill(text: str, folder: Path, scales: dict[str, str] | None = None) -> str:
    """The report's text, its blocks made anew from the summaries in `folder`; `scales`: those that have changed."""
    marker = re.compile(r'<!-- (?P<part>[\w-]+): (?P<scale>\w+) -->')
    scales = dict(marker.findall(text)) | (scales or {})

    def anew(match: re.Match) -> str:
        part = match['part']
        content = overview(scales, folder) if part == 'overview' else block(part, scales[part], folder)
        return f'<!-- {part}: {scales[part]} -->\n\n{content}\n\n<!-- end -->'
    return re.sub(rf'{marker.pattern}.*?<!-- end -->', anew, text, flags=re.DOTALL)


def block(name: str, scale: str, folder: Path) -> str:
    """What the report shows of a part: its command, conditions, table and pictures, as Markdown."""
    part, results = PARTS[name], read(name, folder)
    if not results:
        return '*Not run yet.*'
    command = [f'{part.script.__name__}.py', *arguments(part, scale, sorted({result.seed for result in results}))]
    pictures = [f'![{name}: {picture}]({folder.name}/{name}-{picture}.png)' for picture in part.pictures
                if (folder / f'{name}-{picture}.png').exists()]
    scale = '**Reduced scale**' if is_reduced(name, scale) else 'Full scale'
    return '\n\n'.join([f'    python {shlex.join(command)}', f'{scale}: {results[0].data}, '
                        f'{results[0].training_images:,} training images.', summary_table(results), *pictures])


def overview(scales: dict[str, str], folder: Path) -> str:
    """A table of the parts: their scale, device and time."""
    rows, total = [['part', 'scale', 'runs', 'training', 'on']], 0.0
    for name in PARTS:
        if results := read(name, folder):
            seconds = sum(result.seconds for result in results)
            total += seconds
            scale = f'**reduced**: `{PARTS[name].cpu}`' if is_reduced(name, scales[name]) else 'full'
            rows.append([name, scale, str(len(results)), duration(seconds),
                         f'{results[0].device}, {results[0].precision}'])
    return f'{markdown_table(rows)}\n\nTraining alone took {duration(total)}.'


def read(name: str, folder: Path) -> list[Result]:
    """The results of a part; none where it has not run."""
    path = folder / f'{name}.csv'
    return read_summary(path) if path.exists() else []


def is_reduced(name: str, scale: str) -> bool:
    return scale == 'cpu' and PARTS[name].cpu != ''


if __name__ == '__main__':
    sys.exit(main())
