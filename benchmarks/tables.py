"""What was measured, as Markdown tables and as a picture."""
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from lab.figure import COLOURS, Title, new_figure, own_style, save_figure
from lab.progress import duration
from lab.results import markdown_table

WAYS = USUAL, WITH_WORKERS, PROJECT = 'usual script', 'usual script, with workers', 'this project'


def spread(values: Sequence[float], form: str) -> str:
    """'63.1 (62.0–64.2)': the median, the smallest and the largest."""
    if len(values) == 1:
        return format(values[0], form)
    return f'{median(values):{form}} ({min(values):{form}}–{max(values):{form}})'


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Within each repetition: what changes from one to the next cancels."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def utilisation(case: dict, way: str) -> float:
    """Model FLOP utilisation: the FLOP/s of a way over those of a matrix product in the same precision."""
    one = case['ways'][way]
    return one['flops_per_image'] * median(ratios(one['images_per_second'], case['ceiling'][one['precision']]))


def table(record: dict) -> str:
    """The results as Markdown: the speeds, what limits them, the conditions."""
    speeds = [['images per second', USUAL, 'with workers', PROJECT, 'ratio', 'ratio to workers']]
    limits = [['', 'FLOP per image', 'of the ceiling: usual', 'project', 'epoch: usual', 'project', 'at the ceiling',
               'peak memory: usual', 'project']]
    notes = []
    for name, case in record['cases'].items():
        plain, workers, ours = (case['ways'][way] for way in WAYS)
        epoch = {way: record['epoch_images'] / median(one['images_per_second']) for way, one in case['ways'].items()}
        speeds.append([
            name, spread(plain['images_per_second'], ',.0f'),
            f'{spread(workers["images_per_second"], ",.0f")}, {workers["workers"]} workers',
            f'**{spread(ours["images_per_second"], ",.0f")}**',
            *(f'**{spread(ratios(ours["images_per_second"], other["images_per_second"]), ".2f")}**'
              for other in (plain, workers))])
        limits.append([
            name, f'{ours["flops_per_image"]:.3g}', *(f'{utilisation(case, way):.1%}' for way in (USUAL, PROJECT)),
            *(f'{seconds:,.1f} s' for seconds in (epoch[USUAL], epoch[PROJECT],
                                                  epoch[PROJECT] * utilisation(case, PROJECT))),
            *('–' if one['peak_memory'] is None else f'{one["peak_memory"] / 1e6:,.0f} MB' for one in (plain, ours))])
        if features := case['features']:
            rate = features['images'] / features['seconds']
            once = (2 * record['epoch_images'] + 11_000) / rate
            notes.append(
                f'- {name}: the project trains on features that are made once, {rate:,.0f} images/s. For the training '
                f'images, their mirror images, 1,000 validation and 10,000 test images that is {duration(once)}; '
                f'30 epochs and the features are {duration(once + 30 * epoch[PROJECT])}, 30 epochs of the usual '
                f'script {duration(30 * epoch[USUAL])}.')
    ceiling = {key: spread([value / 1e9 for case in record['cases'].values() for value in case['ceiling'][key]], ',.0f')
               for key in dict.fromkeys(['fp32', record['precision'], 'copy'])}
    in_bf16 = f' and {ceiling["bf16"]} in bf16' if 'bf16' in ceiling else ''
    return '\n'.join([
        markdown_table(speeds), '', markdown_table(limits), '',
        f'Median (smallest–largest) of {record["repetitions"]} repetitions of {record["steps"]} steps of '
        f'{record["batch_size"]} images, in turns; ratios within each turn; an epoch is {record["epoch_images"]:,} '
        f'images.', '',
        f'- {record["device"]}; torch {record["torch"]}, torchvision {record["torchvision"]}; {record["source"]}; '
        f'the project in {record["precision"]} ({record["reason"]}).',
        f'- Ceiling: a matrix product does {ceiling["fp32"]} GFLOP/s in {record["fp32"]}{in_bf16}; a copy moves '
        f'{ceiling["copy"]} GB/s.', *notes])


@own_style()
def plot(record: dict, path: Path) -> Path:
    """Bars of images per second, a panel for each case, since their speeds differ by orders of magnitude."""
    cases = record['cases']
    note = 'Medians, smallest and largest; in brackets the median ratio to the usual script within each turn'
    figure = new_figure(9, 0.4 + 1.15 * len(cases), Title(f'Images trained on per second · {record["device"]}', note))
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for panel, (name, case) in zip(panels, cases.items(), strict=True):
        speeds = [case['ways'][way]['images_per_second'] for way in WAYS]
        middle = [median(values) for values in speeds]
        reach = [[m - min(v) for m, v in zip(middle, speeds, strict=True)],
                 [max(v) - m for m, v in zip(middle, speeds, strict=True)]]
        panel.barh(WAYS, middle, xerr=reach, color=['#b8b8b8', '#8c8c8c', COLOURS[0]], height=0.75, capsize=3)
        for row, (way, speed) in enumerate(zip(WAYS, middle, strict=True)):
            text = f'{speed:,.0f}' + (f'   ({median(ratios(speeds[row], speeds[0])):.1f}x)' if row else '')
            panel.annotate(text, (max(speeds[row]), row), xytext=(6, 0), textcoords='offset points', va='center',
                           fontweight='bold' if way == PROJECT else None)
        panel.set_title(name + (', on features made once' if case['features'] else ''), loc='left', fontsize=11)
        panel.set(xlim=(0, 1.25 * max(map(max, speeds))), xticks=[])
        panel.invert_yaxis()
        panel.spines[['top', 'right', 'bottom']].set_visible(False)
    return save_figure(figure, path)
