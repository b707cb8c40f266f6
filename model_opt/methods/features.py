"""What a network computes on the way: its stages by resolution, and the activations that methods compare."""

from __future__ import annotations

from itertools import groupby

from torch import Tensor, fx, nn

from model_opt.activation import PartialActivation
from model_opt.networks import activation_shapes


def stages(model: nn.Module, input_shape: tuple[int, ...]) -> list[list[str]]:
    """Names of the activations (nn.ReLU or partial) in order, grouped by the resolution of what they see.

    For a ResNet these are the stages of the literature, the stem's ReLU in the first.
    """
    kind = PartialActivation if any(isinstance(m, PartialActivation) for m in model.modules()) else nn.ReLU
    shapes = activation_shapes(model, input_shape, kind)
    return [list(names) for _, names in groupby(shapes, key=lambda name: shapes[name][1:])]


def weights_before(model: nn.Module) -> dict[str, str]:
    """For each nn.ReLU the convolution or linear layer that feeds it, "" if none does; of a residual addition's branches the longer one."""
    graph = fx.Tracer().trace(model)
    position = {node: i for i, node in enumerate(graph.nodes)}
    kinds = {node: model.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}

    def source(node: fx.Node) -> fx.Node | None:
        """The last weights on the way to a node's output, but not across another ReLU."""
        if isinstance(kinds.get(node), (nn.Conv2d, nn.Linear)):
            return node
        if isinstance(kinds.get(node), nn.ReLU):
            return None
        branches = [found for found in map(source, node.all_input_nodes) if found is not None]
        return max(branches, key=lambda found: position[found.all_input_nodes[0]], default=None)

    relus = [node for node, module in kinds.items() if isinstance(module, nn.ReLU)]
    found = {str(relu.target): source(relu.all_input_nodes[0]) for relu in relus}
    return {name: str(node.target) if node is not None else "" for name, node in found.items()}


class Recorder:
    """Keeps inputs and outputs of named modules of a network in its latest forward pass; `close` when done."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._hooks = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in names]

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = args[0], output

        return record

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.inputs.clear()
        self.outputs.clear()
