"""A training step replayed as one CUDA graph: some hundred kernels launched at once. Nothing else knows of graphs."""
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from lab.device import first_sentence, is_out_of_memory

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class replayed:  # used like a function: step = replayed(step, optimizer)
    """The same step, (images, labels) -> (loss, correct), captured at its fourth call and replayed from then on.

    The first three calls are ordinary steps on the stream of the capture: they let cuDNN choose its algorithms and
    the optimiser create its state. Capturing runs nothing, so weights, statistics and random state are those of a
    run without a graph, and if it fails, ordinary steps go on, on the same stream: PyTorch keeps the memory that was
    used on one stream from all others. The next call overwrites the returned tensors.
    """

    def __init__(self, step: Step, optimizer: Optimizer):
        self.step, self.optimizer = step, optimizer
        self.calls, self.graph = 0, None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        stream, current = _stream(images.device), torch.cuda.current_stream(images.device)
        self.calls += 1
        stream.wait_stream(current)
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='.*capturable=True')  # it will be captured soon
            if self.calls == 1:
                self.images, self.labels = torch.empty_like(images), torch.empty_like(labels)
            self.images.copy_(images)
            self.labels.copy_(labels)
            if self.calls > 3 and self.graph is None:
                self.graph = self._capture(stream)
            if self.graph in (None, 'failed'):
                self.result = self.step(self.images, self.labels)
            else:
                self.graph.replay()
        current.wait_stream(stream)
        return self.result

    def _capture(self, stream: torch.cuda.Stream) -> 'torch.cuda.CUDAGraph | str':
        self.optimizer.zero_grad(set_to_none=True)  # so that gradients live in the graph's memory
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.images.device.index]
        random_state = generator.clone_state()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.result = self.step(self.images, self.labels)
        except Exception as error:
            generator.graphsafe_set_state(random_state)  # else as if still capturing: the next draw fails
            why = 'out of memory' if is_out_of_memory(error) else f'{type(error).__name__}: {first_sentence(error)}'
            tqdm.write(f'The training step could not be captured as a CUDA graph ({why}): ordinary steps go on.')
            return 'failed'
        return graph


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)
