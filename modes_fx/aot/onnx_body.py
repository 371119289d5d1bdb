"""`ai.modes_fx::MaskedMoE` in ONNX's own operators: the body of the function that a file carries.

A runtime that knows the operator may run it whole; any other one inlines the body. Two ways, for two kinds
of runtime:

    sparse   kept pairs alone (NonZero), ordered by expert, and one product for each expert on just its rows;
             what is not kept takes no time. As constants, the matrices of the experts are split once, when
             the file is loaded, and packed as the runtime likes them.
    static   sizes follow from the number of tokens alone, as TensorRT-RTX wants them. Pairs are sorted by
             counting into blocks of B rows, each of one expert, and both products are batched over the
             blocks; there are as many as all pairs could need, and dropped pairs lie in none:

             slot of a pair = B * (blocks of earlier experts) + its rank among the pairs of its expert
             y[block]       = formula(x[rows of block] @ gate_up[expert of block]) @ down[expert of block]

Expert weights are `[E, H, 2I]` and `[E, I, H_out]` here, as the products want them. Thresholds are
compared, and a token's pairs are summed, in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from modes_fx.kernels.gate_formula import Formula, parse
from modes_fx.kernels.masked_moe import TEXT, VISION, Call

DOMAIN = "ai.modes_fx"
DOMAIN_VERSION = 1
OPSET = 20
ATTRIBUTES = {
    **dict.fromkeys(("alpha_text", "alpha_vision", "tau_text", "tau_vision"), onnx.AttributeProto.FLOAT),
    "block": onnx.AttributeProto.INT,  # B, for the static way
    "layer": onnx.AttributeProto.STRING,  # for people who read the graph
}

_TYPES = {float: TensorProto.FLOAT, int: TensorProto.INT64}


@dataclass(frozen=True)
class Variation:
    """What two calls must share to share one function. The fields are those of `kernels.masked_moe.Call`."""

    activation: str
    num_experts: int
    has_modality: bool
    has_gate_up_bias: bool
    has_down_bias: bool
    interleaved: bool
    weights_on_input: bool
    renormalise: bool

    @classmethod
    def of(cls, call: Call) -> "Variation":
        return cls(
            activation=str(call.formula),
            num_experts=call.gate_up.shape[0],
            has_modality=call.modality is not None,
            has_gate_up_bias=call.gate_up_bias is not None,
            has_down_bias=call.down_bias is not None,
            interleaved=call.interleaved,
            weights_on_input=call.weights_on_input,
            renormalise=call.renormalise,
        )

    @property
    def inputs(self) -> list[str]:
        """Names of the function's inputs, in order."""
        names = ["hidden", "scores", "weights", "experts"]
        names += ["modality"] * self.has_modality + ["gate_up", "down"]
        return names + ["gate_up_bias"] * self.has_gate_up_bias + ["down_bias"] * self.has_down_bias


def write_function(name: str, variation: Variation, *, sparse: bool) -> onnx.FunctionProto:
    """The function of a variation, for `model.functions`; inputs as `Variation.inputs`, output `out`."""
    body = _Body()
    keep = _keep(body, variation.has_modality)
    weights = body("Reshape", _kept_weights(body, keep, variation.renormalise), body.ints(-1))
    keep = body("Reshape", keep, body.ints(-1))
    total = (_by_expert if sparse else _in_blocks)(body, variation, keep, weights)
    body("CastLike", total, "hidden", output="out")
    return helper.make_function(
        DOMAIN,
        name,
        variation.inputs,
        ["out"],
        body.nodes,
        [helper.make_opsetid("", OPSET)],
        list(ATTRIBUTES),
    )


class _Body:
    """Nodes of a function, as they are written."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[Any, str] = {}

    def __call__(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def several(self, operator: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """The results of an operator that has more than one."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self._constant(tuple(values), [len(values)])

    def scalar(self, value: int) -> str:
        """An int64 scalar."""
        return self._constant((value,), [])

    def floats(self, value: float) -> str:
        """A float32 vector of one element."""
        return self._constant((float(value),), [1])

    def attribute(self, name: str, kind: str) -> str:
        """What a node says for one of `ATTRIBUTES`; `kind` is `float` or `int`."""
        output = self("Constant")
        reference = onnx.AttributeProto(name=f"value_{kind}", ref_attr_name=name, type=ATTRIBUTES[name])
        self.nodes[-1].attribute.append(reference)
        return output

    def count(self, limit: str) -> str:
        """0, 1, ... below `limit`, int64."""
        return self("Range", self.scalar(0), self("Squeeze", limit), self.scalar(1))

    def _constant(self, values: tuple[Any, ...], shape: list[int]) -> str:
        key = (values, type(values[0]), tuple(shape))
        if key not in self._constants:
            tensor = helper.make_tensor("value", _TYPES[type(values[0])], shape, values)
            self._constants[key] = self("Constant", value=tensor)
        return self._constants[key]


def _keep(body: _Body, has_modality: bool) -> str:
    """Pairs that are kept, `[T, K]`, bool: `keep_mask` of the specification."""
    score = body("Cast", "scores", to=TensorProto.FLOAT)

    def dropped(modality: str) -> str:
        scaled = body("Mul", score, body.attribute(f"alpha_{modality}", "float"))
        return body("Less", scaled, body.attribute(f"tau_{modality}", "float"))

    if not has_modality:
        return body("Not", dropped("text"))
    modality = body("Cast", "modality", to=TensorProto.INT64)
    modality = body("Reshape", modality, body.ints(-1, 1))
    as_text = body("And", body("Equal", modality, body.ints(TEXT)), dropped("text"))
    as_vision = body("And", body("Equal", modality, body.ints(VISION)), dropped("vision"))
    return body("Not", body("Or", as_text, as_vision))


def _kept_weights(body: _Body, keep: str, renormalise: bool) -> str:
    """`kept_weights` of the specification, `[T, K]`, float32."""
    weights = body("Cast", "weights", to=TensorProto.FLOAT)
    kept = body("Where", keep, weights, body.floats(0.0))
    if not renormalise:
        return kept
    whole, left = (body("ReduceSum", each, body.ints(1), keepdims=1) for each in (weights, kept))
    rescaled = body("Mul", kept, body("Div", whole, left))
    return body("Where", body("Greater", left, body.floats(0.0)), rescaled, kept)


def _by_expert(body: _Body, variation: Variation, keep: str, weights: str) -> str:
    """The sum over each token's kept pairs, `[T, H_out]`, float32: the sparse way.

    Args:
        keep, weights: Of all pairs, `[T * K]`.
    """
    pairs = body("Reshape", body("NonZero", keep), body.ints(-1))
    experts = body("Gather", body("Reshape", "experts", body.ints(-1)), pairs)
    num_pairs = body("Shape", experts)
    counts = body(
        "ScatterElements",
        body("Expand", body.ints(0), body.ints(variation.num_experts)),
        experts,
        body("Expand", body.ints(1), num_pairs),
        reduction="add",
    )
    # Equal ones stay in their order.
    experts, order = body.several("TopK", experts, num_pairs, outputs=2, largest=0)
    pairs = body("Gather", pairs, order)
    weights = body("Gather", weights, pairs)
    tokens = body("Div", pairs, _slots(body))

    def product(x: str, matrices: str, bias: str | None) -> str:
        rows = body.several("Split", x, counts, outputs=variation.num_experts, axis=0)
        each = body.several(
            "Split", matrices, outputs=variation.num_experts, axis=0, num_outputs=variation.num_experts
        )
        results = [
            body("MatMul", row, body("Squeeze", matrix, body.ints(0)))
            for row, matrix in zip(rows, each, strict=True)
        ]
        y = body("Concat", *results, axis=0)
        return y if bias is None else body("Add", y, body("Gather", bias, experts))

    x = body("Gather", "hidden", tokens)
    if variation.weights_on_input:
        x = _scaled(body, x, weights)
    y = product(x, "gate_up", "gate_up_bias" if variation.has_gate_up_bias else None)
    y = _formula(body, parse(variation.activation), y, variation.interleaved)
    y = product(y, "down", "down_bias" if variation.has_down_bias else None)
    own = body("Cast", y, to=TensorProto.FLOAT)
    if not variation.weights_on_input:
        own = body("Mul", own, body("Unsqueeze", weights, body.ints(1)))
    size = body("Concat", _num_tokens(body), _width(body), axis=0)
    empty, where = body("Expand", body.floats(0.0), size), body("Unsqueeze", tokens, body.ints(1))
    return body("ScatterND", empty, where, own, reduction="add")


def _in_blocks(body: _Body, variation: Variation, keep: str, weights: str) -> str:
    """As `_by_expert`, the static way."""
    layout = _Layout(body, keep)
    tokens = body("Div", body.count(layout.num_pairs), _slots(body))
    x = body("Gather", "hidden", layout.scatter(tokens, body.ints(0)))
    if variation.weights_on_input:
        x = _scaled(body, x, layout.scatter(weights, body.floats(0.0)))
    x = layout.in_blocks(x, body("Shape", "hidden", start=1, end=2))

    def product(x: str, matrices: str, bias: str | None) -> str:
        y = body("MatMul", x, body("Gather", matrices, layout.owner))
        if bias is None:
            return y
        return body("Add", y, body("Unsqueeze", body("Gather", bias, layout.owner), body.ints(1)))

    y = product(x, "gate_up", "gate_up_bias" if variation.has_gate_up_bias else None)
    y = _formula(body, parse(variation.activation), y, variation.interleaved)
    y = product(y, "down", "down_bias" if variation.has_down_bias else None)
    y = body("Reshape", y, body("Concat", layout.num_rows, _width(body), axis=0))
    own = body("Cast", body("Gather", y, layout.slot), to=TensorProto.FLOAT)
    if not variation.weights_on_input:
        own = body("Mul", own, body("Unsqueeze", weights, body.ints(1)))
    # What lies in no block reads another pair's row; 0 * inf would not be 0.
    own = body("Where", body("Unsqueeze", keep, body.ints(1)), own, body.floats(0.0))
    size = body("Concat", _num_tokens(body), _slots(body), _width(body), axis=0)
    return body("ReduceSum", body("Reshape", own, size), body.ints(1), keepdims=0)


class _Layout:
    """Where the pairs lie; those that are not kept lie nowhere.

    Attributes:
        num_pairs: P, `[1]`.
        slot: Row of each pair among the rows of all blocks, `[P]`; 0 for a pair that lies nowhere.
        owner: Expert of each block, `[N]`.
        num_blocks, num_rows: N and N * B, `[1]`.
    """

    def __init__(self, body: _Body, keep: str) -> None:
        self._body = body
        self.num_pairs = body("Mul", _num_tokens(body), _slots(body))
        self.block = body("Reshape", body.attribute("block", "int"), body.ints(1))
        num_experts = body("Shape", "gate_up", start=0, end=1)
        # An expert too many, which none of them is.
        experts = body("Where", keep, body("Reshape", "experts", body.ints(-1)), num_experts)
        of_expert = body("Equal", body("Unsqueeze", experts, body.ints(1)), body.count(num_experts))
        chosen = body("Cast", of_expert, to=TensorProto.INT64)
        so_far = body("CumSum", chosen, body.scalar(0))
        count = body("ReduceSum", chosen, body.ints(0), keepdims=0)
        rank = body("ReduceSum", body("Mul", chosen, so_far), body.ints(1), keepdims=0)
        rank = body("Sub", rank, body.ints(1))
        last = body("Sub", self.block, body.ints(1))
        blocks = body("Div", body("Add", count, last), self.block)
        end = body("CumSum", blocks, body.scalar(0))
        first = body("Sub", end, blocks)
        start = body("ReduceSum", body("Mul", chosen, first), body.ints(1), keepdims=0)
        slot = body("Add", body("Mul", start, self.block), rank)
        # The most that there can be: of each expert that has a pair, all rows of a block but one are empty.
        empty = body("Mul", body("Min", num_experts, self.num_pairs), last)
        self.num_blocks = body("Div", body("Add", self.num_pairs, empty), self.block)
        self.num_rows = body("Mul", self.num_blocks, self.block)
        before = body("GreaterOrEqual", body("Unsqueeze", body.count(self.num_blocks), body.ints(1)), end)
        owner = body("ReduceSum", body("Cast", before, to=TensorProto.INT64), body.ints(1), keepdims=0)
        self.owner = body("Min", owner, body("Sub", num_experts, body.ints(1)))
        # One more row takes what lies nowhere.
        self._scattered = body("Where", keep, slot, self.num_rows)
        self.slot = body("Where", keep, slot, body.ints(0))

    def scatter(self, values: str, fill: str) -> str:
        """`values`, one for each pair, at their slots, `[N * B]`; `fill` elsewhere."""
        body = self._body
        with_spare = body("Add", self.num_rows, body.ints(1))
        all_rows = body("ScatterElements", body("Expand", fill, with_spare), self._scattered, values)
        return body("Slice", all_rows, body.ints(0), self.num_rows)

    def in_blocks(self, rows: str, width: str) -> str:
        """`[N * B, width]` as `[N, B, width]`."""
        return self._body("Reshape", rows, self._body("Concat", self.num_blocks, self.block, width, axis=0))


def _scaled(body: _Body, rows: str, weights: str) -> str:
    """`rows` times their weights, in float32, the dtype of `hidden`."""
    factor = body("Unsqueeze", weights, body.ints(1))
    return body("CastLike", body("Mul", body("Cast", rows, to=TensorProto.FLOAT), factor), "hidden")


def _num_tokens(body: _Body) -> str:
    """T, `[1]`."""
    return body("Shape", "hidden", start=0, end=1)


def _slots(body: _Body) -> str:
    """K, `[1]`."""
    return body("Shape", "scores", start=1, end=2)


def _width(body: _Body) -> str:
    """H_out, `[1]`."""
    return body("Shape", "down", start=2, end=3)


def _formula(body: _Body, formula: Formula, y: str, interleaved: bool) -> str:
    """`Formula.evaluate`, step by step."""
    parts = [y]
    if formula.is_gated:
        inner = body("Shape", "down", start=1, end=2)
        both = body("Mul", inner, body.ints(2))
        first, second = (body.ints(0), body.ints(1)) if interleaved else (body.ints(0), inner)
        stride = body.ints(2 if interleaved else 1)
        ends = (both, both) if interleaved else (inner, both)
        parts = [
            body("Slice", y, start, end, body.ints(-1), stride)
            for start, end in zip((first, second), ends, strict=True)
        ]
    values: dict[str, str] = dict(zip(formula.variables, parts, strict=True))
    in_float32: set[str] = set()
    for i, (function, args) in enumerate(formula.steps):
        tensors = [values[a] for a in args if isinstance(a, str)]
        wide = any(tensor in in_float32 for tensor in tensors)
        like = next((tensor for tensor in tensors if tensor in in_float32), tensors[0])
        operands = []
        for arg in args:
            operand = values[arg] if isinstance(arg, str) else body("CastLike", body.floats(arg), like)
            if wide and isinstance(arg, str) and operand not in in_float32:
                operand = body("Cast", operand, to=TensorProto.FLOAT)
            operands.append(operand)
        result = body("CastLike", operands[0], y) if function == "same" else _STEPS[function](body, *operands)
        values[f"v{i}"] = result
        if function == "float32" or (wide and function != "same"):
            in_float32.add(result)
    return body("CastLike", values[formula.result], y)


def _named(operator: str, **attributes: Any) -> Callable[..., str]:
    return lambda body, *args: body(operator, *args, **attributes)


# Functions and operators of `gate_formula`, each on tensors alone: numbers have become tensors.
_STEPS: dict[str, Callable[..., str]] = {
    "silu": lambda body, a: body("Mul", a, body("Sigmoid", a)),
    "gelu": _named("Gelu"),
    "gelu_tanh": _named("Gelu", approximate="tanh"),
    "relu": _named("Relu"),
    "sigmoid": _named("Sigmoid"),
    "tanh": _named("Tanh"),
    "exp": _named("Exp"),
    "log": _named("Log"),
    "softplus": _named("Softplus"),
    "erf": _named("Erf"),
    "abs": _named("Abs"),
    "sqrt": _named("Sqrt"),
    "rsqrt": lambda body, a: body("Reciprocal", body("Sqrt", a)),
    "square": lambda body, a: body("Mul", a, a),
    "minimum": _named("Min"),
    "maximum": _named("Max"),
    "clamp_min": _named("Max"),
    "clamp_max": _named("Min"),
    "float32": _named("Cast", to=TensorProto.FLOAT),
    "+": _named("Add"),
    "-": _named("Sub"),
    "*": _named("Mul"),
    "/": _named("Div"),
    "**": _named("Pow"),
    "neg": _named("Neg"),
}
