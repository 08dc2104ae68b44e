"""The ways to do the train step that the benchmark compares, all on the same decoder and batch."""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lora_jax as lj
from tests.benchmarks import decoder
from tests.benchmarks.measure import Variant

TX = optax.adamw(1e-3)
ALPHA = 16.0
Loss = Callable[[Any, Any, jax.Array], jax.Array]


def adapter_step(loss: Loss) -> Any:
    """`(adapters, optimiser state, frozen, tokens) -> (adapters, optimiser state, loss)`, the first two donated."""

    def step(adapters: Any, opt_state: Any, frozen: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(adapters, frozen, tokens)
        updates, opt_state = TX.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))


def variant(name: str, loss: Loss, adapters: Any, frozen: Any, tokens: jax.Array) -> Variant:
    """A variant whose step is `adapter_step(loss)`; it owns a copy of the adapters."""
    adapters = jax.tree.map(lambda leaf: leaf.copy(), adapters)
    args = (adapters, TX.init(adapters), frozen, tokens)
    return Variant(name, adapter_step(loss), args, lambda args, out: (*out[:2], *args[2:]))


def all_variants(sizes: decoder.Sizes, flavour: decoder.Flavour) -> list[Variant]:
    """Every variant; peers where they are installed."""
    tokens = decoder.batch(sizes)
    model = decoder.plain(sizes, flavour)
    variables = jax.jit(model.init)(jax.random.key(0), tokens[:, :-1])
    found = [
        variant("full fine-tuning", lambda p, _, t: decoder.loss(model.apply, p, t), variables, {}, tokens),
        *_written_out(sizes, flavour, variables["params"], tokens),
        *_ours(sizes, model, variables, tokens),
    ]
    for package, build in (("qwix", _qwix), ("gemma", _gemma)):
        if importlib.util.find_spec(package):
            found.append(build(sizes, model, variables["params"], tokens))
    return found


def _written_out(sizes: decoder.Sizes, flavour: decoder.Flavour, params: Any, tokens: jax.Array) -> Iterator[Variant]:
    """Naive `W + A B`, and the low-rank products in the model itself."""
    base, low_rank = decoder.plain(sizes, flavour), decoder.by_hand(sizes, flavour)
    pairs = jax.jit(low_rank.init)(jax.random.key(0), tokens[:, :-1])["lora"]

    def add(params: Any, pairs: Any) -> Any:
        if "a" in pairs:
            return {"kernel": params["kernel"] + ALPHA / sizes.rank * (pairs["a"] @ pairs["b"])}
        return {name: add(node, pairs[name]) if name in pairs else node for name, node in params.items()}

    def naive(pairs: Any, params: Any, tokens: jax.Array) -> jax.Array:
        return decoder.loss(base.apply, {"params": add(params, pairs)}, tokens)

    def by_hand(pairs: Any, params: Any, tokens: jax.Array) -> jax.Array:
        return decoder.loss(low_rank.apply, {"params": params, "lora": pairs}, tokens)

    yield variant("naive W + AB", naive, pairs, params, tokens)
    yield variant("by hand", by_hand, pairs, params, tokens)


def _ours(sizes: decoder.Sizes, model: nn.Module, variables: Any, tokens: jax.Array) -> Iterator[Variant]:
    """`lora(fn)` in the same step as the others, in the whole-tree flow, and in `make_train_step`."""
    config = lj.LoraConfig(rank=sizes.rank, alpha=ALPHA, targets=list(decoder.TARGETS))
    adapters = lj.init(jax.random.key(0), config, model.apply, variables, tokens[:, :-1])
    apply, whole = lj.lora(model.apply), lj.optimizer(TX)

    def loss(adapters: Any, variables: Any, tokens: jax.Array) -> jax.Array:
        return decoder.loss(apply, lj.attach(variables, adapters), tokens)

    def whole_step(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(lambda params: decoder.loss(apply, params, tokens))(params)
        updates, opt_state = whole.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = lj.train.make_train_step(lambda params, tokens, key: decoder.loss(apply, params, tokens), TX)
    params = jax.tree.map(lambda leaf: leaf.copy(), lj.attach(variables, adapters))  # donated
    state = lj.train.init_state(adapters, TX, key=jax.random.key(1))
    yield variant("ours, lora(fn)", loss, adapters, variables, tokens)
    dora = dataclasses.replace(config, dora=True)
    yield variant(
        "ours, DoRA", loss, lj.init(jax.random.key(0), dora, model.apply, variables, tokens[:, :-1]), variables, tokens
    )
    yield Variant(
        "ours, whole tree", jax.jit(whole_step, donate_argnums=(0, 1)), (params, whole.init(params), tokens),
        lambda args, out: (*out[:2], *args[2:]),
    )  # fmt: skip
    yield Variant("ours, train step", step, (state, variables, tokens), lambda args, out: (out[0], *args[1:]))


def _split(params: Any, is_adapter: Callable[[str], bool]) -> tuple[list[Any], list[Any], Callable[..., Any]]:
    """The adapters' leaves, the others, and how to put them together again."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    chosen = [is_adapter(jax.tree_util.keystr(path)) for path, _ in leaves]

    def join(adapters: list[Any], others: list[Any]) -> Any:
        mine, rest = iter(adapters), iter(others)
        return jax.tree.unflatten(treedef, [next(mine) if c else next(rest) for c in chosen])

    adapters, others = ([leaf for (_, leaf), c in zip(leaves, chosen) if c is wanted] for wanted in (True, False))
    return adapters, others, join


def _peer(name: str, apply: Callable[..., Any], init: Callable[..., Any], tokens: jax.Array) -> Variant:
    """A peer that keeps its pairs among the parameters, under names with `lora` in them."""
    adapters, others, join = _split(init(jax.random.key(0), tokens[:, :-1])["params"], lambda path: "lora" in path)

    def loss(adapters: Any, others: Any, tokens: jax.Array) -> jax.Array:
        return decoder.loss(lambda params, x: apply({"params": params}, x), join(adapters, others), tokens)

    return variant(name, loss, adapters, others, tokens)


def _qwix(sizes: decoder.Sizes, model: nn.Module, _: Any, tokens: jax.Array) -> Variant:
    import qwix

    pattern = f".*({'|'.join(map(re.escape, decoder.TARGETS))})"
    provider = qwix.LoraProvider(module_path=pattern, rank=sizes.rank, alpha=ALPHA)
    adapted = qwix.apply_lora_to_model(model, provider)
    return _peer("qwix", adapted.apply, adapted.init, tokens)


def _gemma(sizes: decoder.Sizes, model: nn.Module, _: Any, tokens: jax.Array) -> Variant:
    """Gemma's module interceptor, which has no alpha."""
    from gemma import peft

    def replace(module: nn.Module) -> nn.Module:
        adapted = isinstance(module, nn.Dense) and module.name in decoder.TARGETS
        return peft.LoRADense(rank=sizes.rank, wrapped=module, dtype=jnp.float32) if adapted else module

    def intercepted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with peft.ModuleInterceptor(replace):
                return method(*args)

        return call

    return _peer("gemma", intercepted(model.apply), intercepted(model.init), tokens)
