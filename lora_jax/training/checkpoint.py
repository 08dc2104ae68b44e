"""Adapter checkpoints through Orbax: the adapters alone, what they are, and what a run needs to go on.

A checkpoint is `directory/<step>/` with the Orbax items `meta` (JSON: the format version, kinds, layouts, scales,
roles, the configuration, the data position), `adapters` and, where a training state was given, `state` (arrays as
`packing` lays them out).

The arrays are stored whole, wherever they were, so a checkpoint says nothing of a mesh and can be restored onto any. Where
several processes are one program, all of them call what is here, with one directory; the first writes.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lora_jax import sharding
from lora_jax.adapters.config import LoraConfig
from lora_jax.core import paths
from lora_jax.core.adapter import Adapter, check
from lora_jax.core.errors import InputError, MissingError
from lora_jax.core.files import reading
from lora_jax.training import optim, packing, train

__all__ = ["Checkpoint", "Manager", "load", "restore", "save"]

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `restore` found at one step.

    Args:
      adapters: `{path: adapter}`.
      config: the configuration, if one was saved.
      step: the step.
      state: the training state, if `tx` was given.
      data: the data position, if one was saved.

    >>> import tempfile, lora_jax as lj
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, {"head": lj.Full(jnp.ones(2))}, step=3, data={"epoch": 1})
    ...     found = restore(directory)
    >>> found.step, found.data, found.config is None
    (3, {'epoch': 1}, True)
    """

    adapters: dict[str, Adapter]
    config: LoraConfig | None
    step: int
    state: train.TrainState | None
    data: Any


class Manager:
    """Writes checkpoints of one run in the background, and keeps the newest few.

    Args:
      directory: made when the first checkpoint is written.
      keep: how many of the newest checkpoints to keep; `None` for all.

    Raises:
      InputError: `keep` is below 1.

    As a context it is closed at the end:

    >>> import tempfile, lora_jax as lj
    >>> with tempfile.TemporaryDirectory() as directory, Manager(directory, keep=1) as manager:
    ...     manager.save({"head": lj.Full(jnp.ones(2))}, step=1)
    ...     manager.save({"head": lj.Full(jnp.zeros(2))}, step=2)
    ...     manager.wait()
    ...     manager.latest_step(), manager.restore().adapters["head"].value.tolist()
    (2, [0.0, 0.0])
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int | None = None):
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise InputError(f"keep must be None (all checkpoints) or a whole number of at least 1, not {keep!r}")
        self._directory, self._keep = _absolute(directory), keep
        self._orbax: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Manager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        adapters: Mapping[str, Adapter],
        *,
        config: LoraConfig | None = None,
        step: int | None = None,
        state: train.TrainState | None = None,
        data: Any = None,
    ) -> None:
        """Copy the arrays to the host and start to write.

        The arrays may be donated as soon as this returns. An error in the background is raised by the next call.

        Args:
          adapters: `{path: adapter}`, as the others in `lora_jax.checkpoint.save`.
          config: what the adapters were made from.
          step: the step; by default the state's, or 0.
          state: the training state of the same adapters.
          data: the position of the data pipeline.

        Raises:
          InputError: as `lora_jax.checkpoint.save`.
        """
        step = _step(step, state)
        meta, items = _pack(adapters, config, step, state, data)
        self.wait()
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise InputError(
                f"{self._directory} has a checkpoint of step {newest} already, so one of step {step} can't be added: "
                "steps must grow. Save at a later step, or in another directory."
            )
        arrays = {name: ocp.args.PyTreeSave(vectors) for name, vectors in items.items()}
        self._open().save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays), force=True)

    def latest_step(self) -> int | None:
        """The newest complete step, or `None`."""
        return max(_steps(self._directory), default=None)

    def restore(self, step: int | None = None, tx: Any = None, variables: Any = None) -> Checkpoint:
        """Read a checkpoint, the newest by default.

        Args:
          step: the step, as the others in `lora_jax.checkpoint.restore`.
          tx: the optimiser, to restore the training state, too.
          variables: the base's parameters, to check the adapters against.

        Raises:
          InputError: as `lora_jax.checkpoint.restore`.
        """
        self.wait()
        return restore(self._directory, step=step, tx=tx, variables=variables)

    def wait(self) -> None:
        """Wait until every checkpoint is on disk."""
        if self._orbax is not None:
            self._orbax.wait_until_finished()
            multihost_utils.sync_global_devices("lora_jax.checkpoint")  # the first process ends its writing last

    def close(self) -> None:
        """Wait, and end the background threads.

        >>> manager = Manager("run")
        >>> manager.close()  # nothing was begun
        """
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager, made at the first save, so that a reader never removes what another process is writing."""
        if self._orbax is None:
            _clear_incomplete(self._directory, remove_old=self._keep is not None)
            self._orbax = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
                    cleanup_tmp_directories=True,
                    save_root_metadata=False,
                ),
            )
        return self._orbax


def save(
    directory: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    *,
    config: LoraConfig | None = None,
    step: int | None = None,
    state: train.TrainState | None = None,
    data: Any = None,
) -> None:
    """Write one checkpoint, atomically: after a crash at any moment it is there in full or not at all.

    Args:
      directory: the run's directory; each step has one of its own in it.
      adapters: `{path: adapter}`.
      config: what the adapters were made from.
      step: the step; by default the state's, or 0.
      state: the training state of the same adapters, so that a resumed run goes on bit for bit.
      data: the position of the data pipeline, of JSON's own types (no tuples, string keys only).

    Raises:
      InputError: the directory has this step or a later one, the state holds other adapters, `data` would not come back
        from JSON as it is, or an adapter is abstract.

    >>> import tempfile
    >>> from lora_jax.core.adapter import Layout, LowRank
    >>> pair = LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)), Layout((), (0,), (1,)), scale=2.0)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, {"layer%2E0/w": pair}, step=10)
    ...     load(directory)["layer%2E0/w"].scale
    2.0
    """
    with Manager(directory) as manager:
        manager.save(adapters, config=config, step=step, state=state, data=data)


def load(directory: str | os.PathLike[str], *, step: int | None = None, variables: Any = None) -> dict[str, Adapter]:
    """The adapters of a checkpoint, for which no base model is needed.

    Args:
      directory: the run's directory.
      step: the step; by default the newest complete one.
      variables: the base's parameters, to check the adapters against, and to go where they are, as in `restore`.

    Raises:
      InputError: as `restore`; a checkpoint that is not there is a `MissingError`.

    >>> import tempfile, lora_jax as lj
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, {"head": lj.Full(jnp.ones(2))})
    ...     load(directory)["head"].value
    Array([1., 1.], dtype=float32)
    """
    return restore(directory, step=step, variables=variables).adapters


def restore(directory: str | os.PathLike[str], *, step: int | None = None, tx: Any = None, variables: Any = None) -> Checkpoint:
    """Everything in a checkpoint, as arrays on the default device, or on the mesh of `variables`.

    Args:
      directory: the run's directory.
      step: the step; by default the newest complete one.
      tx: the optax optimiser of the run, which says how its state is built. Without it the state is left out.
      variables: the base's parameters (or their shapes), to check the adapters against. Where they have a `NamedSharding`,
        the adapters go where `sharding.adapter_shardings` says, and the state where `sharding.state_shardings` does.

    Raises:
      MissingError: there is no complete checkpoint, or none of this step.
      InputError: the checkpoint is damaged or of another format version; some adapters do not fit `variables`, and all their
        paths are named; or `tx` is given and the checkpoint has no training state, or that of another optimiser.

    >>> import tempfile, optax, lora_jax as lj
    >>> adapters, tx = {"head": lj.Full(jnp.ones(2))}, optax.adam(0.1)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, adapters, state=train.init_state(adapters, tx, key=jax.random.key(0)))
    ...     found = restore(directory, tx=tx)
    >>> int(found.state.step), found.state.adapters["head"].value.tolist()
    (0, [1.0, 1.0])
    """
    folder = _find(_absolute(directory), step)
    meta = _read_meta(folder)
    vectors = {item: _read_vectors(folder / item) for item in meta["items"] if item == "adapters" or tx is not None}
    try:
        adapters = packing.unpack_adapters(meta["adapters"], vectors["adapters"])
        if variables is not None:
            _check_fit(adapters, variables)
            adapters = sharding.put_beside(variables, adapters)
        state = None if tx is None else _unpack_state(meta["state"], vectors.get("state", {}), adapters, tx)
    except InputError as error:
        raise InputError(f"the checkpoint {folder} can't be used: {error}") from None
    config = None if meta["config"] is None else LoraConfig.from_json(json.dumps(meta["config"]))
    return Checkpoint(adapters, config, meta["step"], state, meta["data"])


def _absolute(directory: str | os.PathLike[str]) -> epath.Path:
    """An absolute path, as Orbax wants it; a URL stands as it is."""
    path = os.fspath(directory)
    return epath.Path(path if "://" in path else os.path.abspath(path))


def _step(step: int | None, state: train.TrainState | None) -> int:
    step = step if step is not None else 0 if state is None else int(state.step)
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise InputError(f"step must be a whole number of at least 0, not {step!r}")
    return int(step)


def _steps(directory: epath.Path) -> dict[int, epath.Path]:
    """The folders of the complete steps."""
    if not directory.exists():
        return {}
    with reading(directory):
        return {int(path.name): path for path in directory.iterdir() if path.name.isdecimal() and _is_complete(path)}


def _is_complete(folder: epath.Path) -> bool:
    """Whether a step was written to its end: Orbax closed its folder, and all items that its JSON lists are there."""
    try:
        items = json.loads((folder / "meta" / "metadata").read_text())["items"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    written = [folder / "_CHECKPOINT_METADATA", *(folder / item / "manifest.ocdbt" for item in items)]
    return all(path.exists() for path in written) and ocp.path.step.is_path_finalized(folder)


def _clear_incomplete(directory: epath.Path, remove_old: bool) -> None:
    """Take incomplete step folders, which Orbax would count as steps, out of its way.

    With `remove_old`, those before the newest complete step go: a run that was killed was removing them. Others are renamed.
    """
    if jax.process_index() or not directory.exists():
        return
    newest = max(_steps(directory), default=-1)
    for folder in list(directory.iterdir()):
        if not folder.name.isdecimal() or not folder.is_dir() or _is_complete(folder):
            continue
        if remove_old and int(folder.name) < newest:
            folder.rmtree()
        else:
            aside = directory / f"{folder.name}.incomplete"
            if aside.exists():
                aside.rmtree()
            folder.rename(aside)


def _find(directory: epath.Path, step: int | None) -> epath.Path:
    steps = _steps(directory)
    if not steps:
        raise MissingError(f"{directory} has no complete checkpoint: check the path, or save one there first")
    if step is None:
        return steps[max(steps)]
    if step not in steps:
        raise MissingError(f"{directory} has no complete checkpoint of step {step}, only of {sorted(steps)}")
    return steps[step]


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    with reading(folder):
        meta = json.loads((folder / "meta" / "metadata").read_text())
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"the checkpoint {folder} has the format version {version!r}, but this lora_jax reads {FORMAT_VERSION}: "
            "use the lora_jax that wrote it"
        )
    return meta


def _read_vectors(folder: epath.Path) -> dict[str, np.ndarray]:
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(folder)
    except Exception as error:  # Orbax and TensorStore have no error class of their own for a damaged file
        raise InputError(f"the arrays in {folder} can't be read; `step` takes another checkpoint: {error}") from error


def _pack(
    adapters: Mapping[str, Adapter], config: LoraConfig | None, step: int, state: train.TrainState | None, data: Any
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """The JSON, and the vectors of each item."""
    if not adapters:
        raise InputError("there are no adapters to save: the adapter set is empty")
    table, vectors = packing.pack_adapters(adapters)
    items, leaves = {"adapters": vectors}, None
    if state is not None:
        _check_same(adapters, state.adapters)
        named, _ = paths.flatten(dataclasses.replace(state, adapters=None))
        specs, items["state"] = packing.pack(named)
        leaves = dict(zip(named, specs))
    meta = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "items": list(items),
        "config": None if config is None else json.loads(config.to_json()),
        "adapters": table,
        "state": leaves,
        "data": _json_value(data),
    }
    return json.loads(json.dumps(meta, default=lambda value: value.item())), items


def _json_value(data: Any) -> Any:
    try:
        same = json.loads(json.dumps(data)) == data
    except (TypeError, ValueError):
        same = False
    if not same:
        raise InputError(
            f"data must come back from JSON as it is (no tuples, arrays or NaN, and string keys only), not {data!r}"
        )
    return data


def _check_same(adapters: Mapping[str, Adapter], others: Mapping[str, Adapter]) -> None:
    mine, treedef = jax.tree.flatten(dict(adapters))
    theirs, other = jax.tree.flatten(dict(others))
    if treedef != other or any(x is not y and _differ(x, y) for x, y in zip(mine, theirs)):
        raise InputError("the adapters to save are not those of the state: pass state.adapters, or leave the state out")


def _differ(one: Any, other: Any) -> bool:
    one, other = sharding.gather((one, other))
    return bool(np.any(np.asarray(one) != np.asarray(other)))


def _unpack_state(leaves: Any, vectors: Mapping[str, np.ndarray], adapters: dict[str, Adapter], tx: Any) -> train.TrainState:
    """The training state: its structure is that of a new one, its arrays are the saved ones."""
    if leaves is None:
        raise InputError("it was saved without a training state, so there is none to restore with `tx`")
    shapes = jax.tree.map(lambda leaf: _of_dtype(leaf, leaf.dtype), adapters)
    new = train.init_state(shapes, tx, key=jax.random.key(0))
    wanted, treedef = paths.flatten(dataclasses.replace(new, adapters=None))
    values = dict(zip(leaves, packing.unpack(list(leaves.values()), vectors)))
    if wanted.keys() != values.keys():
        before, of_before = paths.flatten(
            dataclasses.replace(new, adapters=None, opt_state=optim.without_copies(new.opt_state))
        )
        if before.keys() == values.keys():
            wanted, treedef = {path: _of_dtype(leaf, values[path].dtype) for path, leaf in before.items()}, of_before
    odd = [path for path in dict.fromkeys([*wanted, *values]) if not _alike(wanted.get(path), values.get(path))]
    if odd:
        lines = [f"\n  {path}: {_text(values.get(path))}, `tx` has {_text(wanted.get(path))}" for path in odd[:10]]
        raise InputError("its training state is that of another optimiser than `tx`. It has" + "".join(lines))
    leaves = [_like(leaf, values[path]) for path, leaf in wanted.items()]
    return dataclasses.replace(jax.tree.unflatten(treedef, leaves), adapters=adapters)


def _of_dtype(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


def _like(wanted: Any, value: Any) -> Any:
    """The value where the wanted one is to be."""
    if not sharding.on_mesh(wanted):
        return value
    if packing.is_key(value):
        data = sharding.put(np.asarray(jax.random.key_data(value)), wanted.sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    return sharding.put(np.asarray(value), wanted.sharding)


def _alike(wanted: Any, value: Any) -> bool:
    if wanted is None or value is None:
        return False
    same_dtype = wanted.dtype == value.dtype or (packing.is_key(wanted) and packing.is_key(value))
    return same_dtype and wanted.shape == value.shape


def _text(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def _check_fit(adapters: Mapping[str, Adapter], variables: Any) -> None:
    leaves, _ = paths.flatten(variables)
    problems = []
    for path, adapter in adapters.items():
        if path not in leaves:
            near = ", ".join(paths.near_misses(leaves, path, count=1))
            problems.append(f"{path}: there is no such parameter; the nearest is {near}")
            continue
        try:
            check(path, adapter, jnp.shape(leaves[path]))
        except InputError as error:
            problems.append(str(error))
    if problems:
        listing = "".join(f"\n  {problem}" for problem in problems)
        raise InputError(f"{len(problems)} of {len(adapters)} adapters do not fit the base's parameters:{listing}")
