#!/usr/bin/env python3
"""Run every experiment of both scripts and fill their tables and pictures into report/README.md.

    python report/make.py --data FOLDER --weights FILE    # every question as the assignment has it, three seeds
    python report/make.py --scale cpu                     # reduced where a CPU would take days, and said so

The same command continues what was interrupted, and runs that the scripts have finished are not repeated. What stands
in README.md between `<!-- Q1: CONSTANTS -->` and `<!-- end -->` is replaced by what part Q1 gave with these constants
(none: at full scale), but full scale never by a reduced one; tables and pictures are kept beside it. The text around
it stays as it is: it speaks of the runs that were published, and is yours to rewrite. Q1.csv has the results of part Q1
unrounded, Q1-epochs.csv its curves.
"""
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import tyro

import ex3_convnet
import ex3_pretrained
from lab.constants import read_constants, slug
from lab.errors import ends_in_a_sentence
from lab.files import read_csv, to_csv, write_atomically
from lab.history import Epoch, History
from lab.progress import duration
from lab.results import Result, markdown_table, summary_table
from models.weights import fingerprint

HERE = Path(__file__).parent


class Part(NamedTuple):
    """One experiment of the report."""
    script: ModuleType
    experiment: str
    pictures: tuple[str, ...]
    reduced: str = ''  # constants of the reduced version; '' where a CPU manages the whole
    seeds: tuple[int, ...] = ()  # of the reduced version; () are the script's own


QUARTER = 'hidden_size=32,128,128,128,128 num_epochs=20'  # of the filters
SEEN = ('curves', 'mistakes', 'confusion')
PARTS = {  # in the order in which they run
    'fast': Part(ex3_convnet, 'fast', SEEN, seeds=(0, 1, 2)),
    'Q1': Part(ex3_convnet, 'Q1', (*SEEN, 'filters')),
    'Q2a': Part(ex3_convnet, 'Q2a', ('curves',)),
    'Q4a': Part(ex3_pretrained, 'Q4a', ('curves',), seeds=(0, 1, 2)),
    'Q4b': Part(ex3_pretrained, 'Q4b', ('curves', 'accuracy', 'filters', 'mistakes', 'confusion')),
    'best': Part(ex3_convnet, 'best', SEEN),
    'Q3a': Part(ex3_convnet, 'Q3a', ('accuracy', 'gallery'), QUARTER),
    'Q3b': Part(ex3_convnet, 'Q3b', ('dropout',), QUARTER),
    'Q3a-strength': Part(ex3_convnet, 'Q3a-strength', ('accuracy',), QUARTER),
    'ingredients': Part(ex3_convnet, 'ingredients', ('accuracy',), QUARTER),
    'Q2b': Part(ex3_convnet, 'Q2b', ('curves', 'best_and_latest'), 'hidden_size=64,256,256,256,256'),
    'Q4-best': Part(ex3_pretrained, 'best', ('curves',), 'num_epochs=3'),
}


@dataclass
class RunEpoch(Epoch):
    """A row of Q1-epochs.csv: an epoch of history.csv, and whose it is."""
    run: str
    seed: int


@dataclass(frozen=True)
class Options:
    """Run every experiment of both scripts and fill report/README.md."""
    scale: Literal['full', 'cpu'] = 'full'  # cpu: fewer filters or epochs where a CPU would take days
    parts: tuple[str, ...] = tuple(PARTS)  # which parts
    seeds: tuple[int, ...] | None = None  # repetitions, once all parts have run; None: 0 1 2, with cpu none
    data: str = 'auto'  # as in the scripts
    weights: str = 'imagenet'  # as in ex3_pretrained.py
    results: Path = HERE.parent / 'results'
    report: Path = HERE / 'README.md'


@ends_in_a_sentence
def main(argv: Sequence[str] = ()) -> int:
    """Run what is not finished and fill the report; returns 0, or the worst exit status of a part.

    A part of status 1 lacks some of its runs (no weights, say), and the others go on. Any other ends the report.
    """
    options = tyro.cli(Options, args=list(argv), prog='report/make.py')
    if unknown := [name for name in options.parts if name not in PARTS]:
        raise ValueError(f'parts must be of {", ".join(PARTS)}; got {unknown[0]!r}')
    is_full = options.scale == 'full'
    more = ((0, 1, 2) if is_full else ()) if options.seeds is None else options.seeds
    for script in dict.fromkeys(PARTS[name].script for name in options.parts):  # before hours of training
        read_constants(script.__name__, replace(script.Config(), seeds=more or (0,)), script.QUESTIONS, [])
        if script is ex3_pretrained:
            fingerprint(options.weights)
    check_blocks(options.report)
    statuses = [0]
    for seeds in [(), more] if more else [()]:  # the scripts' own first, so that all parts are there early
        for name in options.parts:
            part = PARTS[name]
            reduced = '' if is_full else part.reduced
            published = constants_in(options.report.read_text(encoding='utf-8'))
            if reduced and was_measured(read(name, options.report.parent)) and published.get(name) == '':
                print(f'{name}: the report has it at full scale, skipped')
                continue
            statuses.append(run(part, options, reduced, seeds or (() if is_full else part.seeds)))
            if statuses[-1] > 1:
                return statuses[-1]
            if collect(name, options):
                text = options.report.read_text(encoding='utf-8')  # which may have been edited in the meantime
                write_atomically(options.report, fill(text, options.report.parent, {name: reduced}))
    return max(statuses)


# --- running ------------------------------------------------------------------------------------------------


def arguments(part: Part, constants: str, seeds: Sequence[int]) -> list[str]:
    """The command line of a part, but for its data, weights and results: 'num_epochs=3' -> ['--num-epochs', '3']."""
    line = ['--experiment', part.experiment]
    for constant in constants.split():
        key, values = constant.split('=')
        line += [f'--{key.replace("_", "-")}', *values.split(',')]
    return line + (['--seeds', *map(str, seeds)] if seeds else [])


def run(part: Part, options: Options, constants: str, seeds: Sequence[int]) -> int:
    """Run one part, with these seeds or the script's own -> its exit status."""
    weights = ['--weights', options.weights] if part.script is ex3_pretrained else []
    return part.script.main([*arguments(part, constants, seeds), '--data', options.data, *weights,
                             '--results', str(options.results)])


def collect(name: str, options: Options) -> bool:
    """Copy what a part has just written beside the report -> False where no run could be done and one had been."""
    part, target = PARTS[name], options.report.parent
    summaries = [path for path in (options.results / part.script.__name__).glob('*/summary.csv')
                 if re.fullmatch(rf'{part.experiment}(-[0-9]+)?', path.parent.name)]
    newest = max(summaries, key=lambda path: path.stat().st_mtime).parent  # other constants have other folders
    if was_measured(read(name, target)) and not was_measured(read_csv(Result, newest / 'summary.csv')):
        print(f'{name}: no run could be done, the report keeps what it has')
        return False
    shutil.copyfile(newest / 'summary.csv', target / f'{name}.csv')
    epochs = [RunEpoch(**vars(epoch), run=result.run, seed=result.seed)
              for result in read(name, target) if result.epochs
              for epoch in History.read(newest / slug(result.run) / f'seed{result.seed}' / 'history.csv').epochs]
    write_atomically(target / f'{name}-epochs.csv', to_csv(RunEpoch, epochs))
    for picture in part.pictures:
        made, published = newest / f'{picture}.png', target / f'{name}-{picture}.png'
        if made.exists():
            shutil.copyfile(made, published)
        else:  # no run could be done
            published.unlink(missing_ok=True)
    return True


def was_measured(results: Sequence[Result]) -> bool:
    return any(result.status == 'finished' for result in results)


# --- writing ------------------------------------------------------------------------------------------------


MARKER = re.compile(rf'<!-- (?P<part>overview|{"|".join(map(re.escape, PARTS))}):(?P<constants>[^>]*) -->')
BLOCK = re.compile(rf'{MARKER.pattern}(?:(?!<!-- ).)*<!-- end -->', re.DOTALL)


def check_blocks(report: Path) -> None:
    """Raise ValueError where a block has lost its end: what follows it would be taken for a part of it."""
    text = report.read_text(encoding='utf-8')
    whole = [block.start() for block in BLOCK.finditer(text)]
    for marker in MARKER.finditer(text):
        if marker.start() not in whole:
            raise ValueError(f'{report}: {marker[0]} needs an <!-- end --> before the next comment')


def constants_in(text: str) -> dict[str, str]:
    """part -> the constants that its block of the report was made with; '' at full scale."""
    return {part: words.strip() for part, words in MARKER.findall(text)}


def fill(text: str, folder: Path, made: dict[str, str] | None = None) -> str:
    """The report's text, its blocks made anew from the summaries in `folder`; made: part -> its constants, if new."""
    constants = constants_in(text) | (made or {})

    def anew(match: re.Match) -> str:
        part = match['part']
        content = overview(constants, folder) if part == 'overview' else block(part, constants[part], folder)
        return f'<!-- {part}: {constants[part]} -->\n\n{content}\n\n<!-- end -->'
    return BLOCK.sub(anew, text)


def block(name: str, constants: str, folder: Path) -> str:
    """What the report shows of a part: its command, conditions, table and pictures, as Markdown."""
    part, results = PARTS[name], read(name, folder)
    if not results:
        return '*Not run yet.*'
    line = [f'{part.script.__name__}.py', *arguments(part, constants, sorted({result.seed for result in results}))]
    first, scale = results[0], '**Reduced scale**' if constants else 'Full scale'
    pictures = [f'![{name}: {picture}]({name}-{picture}.png)' for picture in part.pictures
                if (folder / f'{name}-{picture}.png').exists()]
    return '\n\n'.join([f'    python {shlex.join(line)}', f'{scale}: {first.data}, {first.training_images:,} training, '
                        f'{first.validation_images:,} validation, {first.test_images:,} test images.',
                        summary_table(results), *pictures])


def overview(constants: dict[str, str], folder: Path) -> str:
    """A table of the parts: their scale, device and time."""
    rows, every = [['part', 'scale', 'runs', 'training', 'on']], set()
    for name in PARTS:
        if name in constants and (results := read(name, folder)):
            seconds = [result.seconds for result in results]
            every |= {*seconds}  # a run that two parts share once: its seconds are the same to the last digit
            devices = ' / '.join(dict.fromkeys(f'{result.device}, {result.precision}' for result in results))
            rows.append([name, f'**reduced**: {constants[name]}' if constants[name] else 'full', str(len(results)),
                         duration(sum(seconds)), devices])
    return f'{markdown_table(rows)}\n\nTraining alone took {duration(sum(every))}.'


def read(name: str, folder: Path) -> list[Result]:
    """The results of a part; none where it has not run."""
    path = folder / f'{name}.csv'
    return read_csv(Result, path) if path.exists() else []


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
