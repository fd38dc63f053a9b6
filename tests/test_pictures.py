"""Pictures of images and of the confusion of classes, asked for what they show."""
import numpy as np
import torch
from test_plots import texts

from lab.pictures import plot_confusion, plot_gallery, plot_mistakes


def test_gallery_shows_each_image_in_its_colours_beside_its_name(tmp_path, drawn):
    images = torch.rand(2, 3, 32, 32)
    plot_gallery({'none': images, 'flip': images.flip(3)}, tmp_path / 'g.png', 'Q3a')
    rows = {panel.get_yticklabels()[0].get_text(): panel.images[0].get_array() for panel in drawn[0].axes}
    np.testing.assert_allclose(rows['none'][:, :32], images[0].permute(1, 2, 0))
    np.testing.assert_allclose(rows['flip'][:, 34:], images[1].flip(2).permute(1, 2, 0))


def test_mistakes_are_the_surest_first_with_given_class_probability_and_true_class(tmp_path, drawn):
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 1, 2])
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.04, 0.05, 0.91], [0.0005, 0.999, 0.0005]]).log()
    for right, count in ((labels, 24), (labels, 1), (logits.argmax(1), 24)):
        plot_mistakes(images, right, logits, ['cat', 'dog', '海' * 20], tmp_path / 'm.png', 'Q1', count=count)
    shown, first, none = [[panel for panel in figure.axes if panel.images] for figure in drawn]
    assert [panel.get_title() for panel in shown] == ['dog >99%', '海海海海海海… 91%', 'cat 60%']
    assert [panel.texts[0].get_text() for panel in shown] == ['is: 海海海海海海海…', 'is: dog', 'is: dog']
    for panel, i in zip(shown, (3, 2, 1), strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array(), images[i].permute(1, 2, 0))
    assert any('3 of 4 test images' in text for text in texts(drawn[0]))
    assert [panel.get_title() for panel in first] == ['dog >99%']
    assert not none and 'No mistake.' in texts(drawn[2])


def test_confusion_has_true_classes_as_rows_in_percent_and_their_accuracy_in_the_margin(tmp_path, drawn):
    labels, given = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 2, 1])
    plot_confusion(labels, torch.eye(3)[given], ['cat', 'dog', 'ship'], tmp_path / 'c.png', 'Q1')
    (panel,) = drawn[0].axes
    (image,) = panel.images
    np.testing.assert_allclose(np.ma.filled(image.get_array(), -1),
                               [[-1, 25, 0], [0, -1, 50], [-1, -1, -1]])  # the right ones and empty rows are grey
    assert image.get_clim() == (0, 50)  # up to the most frequent mistake
    cells = {text.get_position(): text.get_text() for text in panel.texts if not hasattr(text, 'xyann')}
    assert cells == {(0, 0): '75', (1, 0): '25', (1, 1): '50', (2, 1): '50'}  # (column, row)
    margin = {text.xy[1]: text.get_text() for text in panel.texts if hasattr(text, 'xyann') and '%' in text.get_text()}
    assert margin == {0: '75.0%', 1: '50.0%'} and 'no image' in texts(panel)
    assert [label.get_text() for label in panel.get_yticklabels()] == ['cat', 'dog', 'ship']
    assert (panel.get_xlabel(), panel.get_ylabel()) == ('class given by the network', 'true class')
    assert any('66.7% of all 6 images' in text for text in texts(drawn[0]))

    plot_confusion(torch.arange(30), torch.eye(30).roll(1, 1), list(map(str, range(30))), tmp_path / 'c.png', 'Q1')
    panel, bar = drawn[1].axes  # too many for numbers
    assert not [text for text in panel.texts if not hasattr(text, 'xyann')] and '%' in bar.get_ylabel()

    plot_confusion(torch.arange(200), torch.eye(200), list(map(str, range(200))), tmp_path / 'c.png', 'Q1')
    drawn[2].draw_without_rendering()
    panel = drawn[2].axes[0]  # too many for names
    boxes = [label.get_window_extent() for label in panel.get_yticklabels()]
    assert all(below.y1 <= above.y0 + 3 for above, below in zip(boxes, boxes[1:], strict=False)) and len(boxes) == 100
    assert len([text for text in panel.texts if text.get_text() == '100.0%']) == len(boxes)
