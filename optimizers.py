"""The optimisers: Adam, SGD, and Muon, which learns more from an epoch than either."""
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

BIAS_SCALE, WEIGHT_SCALE = 0.03 / 0.15, 0.01 / 0.15  # Adam's learning rates beside 0.15 for Muon: measured together
BETAS, EPSILON = (0.9, 0.99), 1e-8  # of this Adam
QUINTIC = 3.4445, -4.7750, 2.0315  # steep at 0, near 1 up to 1 (K. Jordan, https://kellerjordan.github.io/posts/muon/)


def make_optimizer(name: str, model: nn.Module, learning_rate: float, reg: float = 0.0,
                   scales: Mapping[str, float] | None = None, precision: str = 'fp32') -> Optimizer:
    """'Adam' or 'SGD' (Nesterov momentum 0.9) with weight decay `reg`, or 'Muon', which has none.

    scales: a factor on the learning rate of all parameters whose names start so: {'features.': 0.3}. Frozen
    parameters are left out. precision: of Muon's matrix products. Raises ValueError for another name.
    """
    if name not in ('Adam', 'SGD', 'Muon'):
        raise ValueError(f"optimizer must be 'Adam', 'SGD' or 'Muon', got {name!r}")
    groups, superfluous = {}, _biases_before_batch_norm(model) if name == 'Muon' else set()
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter in superfluous:
            continue
        kind, scale = name, 1.0
        if name == 'Muon' and parameter.ndim != 4:
            kind, scale = 'Adam', BIAS_SCALE if parameter_name.endswith('bias') else WEIGHT_SCALE
        for start, factor in (scales or {}).items():
            scale *= factor if parameter_name.startswith(start) else 1.0
        groups.setdefault((kind, scale), []).append(parameter)
    device = next(model.parameters()).device
    on_cuda = device.type == 'cuda'  # there the step is one graph, and a graph reads its learning rate from a tensor
    groups = [dict(params=parameters, kind=kind, scale=scale,
                   lr=torch.tensor(learning_rate, device=device) if on_cuda else learning_rate)
              for (kind, scale), parameters in groups.items()]
    if name == 'Adam':
        return torch.optim.Adam(groups, weight_decay=reg, fused=True, capturable=on_cuda)
    if name == 'SGD':
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=reg, fused=True)
    return Muon(groups, dtype=torch.bfloat16 if precision == 'bf16' else torch.float32)


def _biases_before_batch_norm(model: nn.Module) -> set[Tensor]:
    """Biases that batch norm takes away again: their gradient is rounding noise, which Adam would blow up."""
    layers = [layer for layer in model.modules() if not any(layer.children())]
    return {layer.bias for layer, following in pairwise(layers)
            if isinstance(layer, nn.Conv2d) and isinstance(following, nn.BatchNorm2d) and layer.bias is not None}


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give each group `learning_rate` times its scale."""
    for group in optimizer.param_groups:
        if isinstance(group['lr'], Tensor):
            group['lr'].fill_(learning_rate * group['scale'])
        else:
            group['lr'] = learning_rate * group['scale']


class Muon(Optimizer):
    """Muon for convolutions (K. Jordan, 2024); Adam for the parameters of groups with kind='Adam'.

    A step turns all of a layer's filters at the same speed: it replaces the momentum's singular values by about 1.
    Before it, the filters are scaled to length 1 on average. That takes the place of weight decay, and changes
    nothing where batch norm follows. Nothing here waits for the GPU; `lr` may be a tensor, as CUDA graphs demand.
    dtype: of the matrix products; bfloat16 is slow on CPUs that have no instructions for it.
    """

    def __init__(self, params, lr: float | Tensor = 0.15, momentum: float = 0.6, steps: int = 5,
                 dtype: torch.dtype = torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, kind='Muon', scale=1.0))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            update = self._update_by_muon if group['kind'] == 'Muon' else self._update_by_adam
            for parameter in group['params']:
                if parameter.grad is not None:
                    update(parameter, self.state[parameter], group)

    def _update_by_muon(self, weight: Tensor, state: dict, group: dict) -> None:
        if not state:
            state['momentum'] = torch.zeros_like(weight)
        momentum = state['momentum'].mul_(group['momentum']).add_(weight.grad)
        direction = weight.grad + group['momentum'] * momentum  # Nesterov's
        filters, inputs = len(weight), weight[0].numel()
        weight.mul_(filters ** 0.5 / weight.norm())
        direction = orthogonalise(direction.flatten(1), group['steps'], self.dtype).view(weight.shape)
        weight.sub_(direction * (group['lr'] * max(1, filters / inputs) ** 0.5))

    def _update_by_adam(self, parameter: Tensor, state: dict, group: dict) -> None:
        if not state:
            state.update(count=torch.zeros((), device=parameter.device), mean=torch.zeros_like(parameter),
                         square=torch.zeros_like(parameter))
        count = state['count'].add_(1)
        mean = state['mean'].lerp_(parameter.grad, 1 - BETAS[0]) / (1 - BETAS[0] ** count)
        square = state['square'].lerp_(parameter.grad.square(), 1 - BETAS[1]) / (1 - BETAS[1] ** count)
        parameter.sub_(group['lr'] * mean / (square.sqrt() + EPSILON))


def orthogonalise(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(n, m) -> its nearly orthogonal factor, float: U S V' becomes U S' V', S' between about 0.7 and 1.2.

    By Newton-Schulz iteration: an odd polynomial of a matrix is the polynomial of its singular values. Those below
    about a hundredth of the largest stay smaller.
    """
    a, b, c = QUINTIC
    x = (matrix / matrix.norm().clamp(min=1e-7)).to(dtype)  # singular values are now at most 1
    wide = matrix.shape[0] <= matrix.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram²) x
    return (x if wide else x.T).to(matrix.dtype)
