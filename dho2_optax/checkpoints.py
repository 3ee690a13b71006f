"""States that outlive their devices: a saved state, laid out for the devices that are there now.

What a state holds for every parameter is packed and padded for a number of devices (:mod:`dho2_optax.packing`,
:mod:`dho2_optax.segments`), so its shapes depend on it: rows are padded to a multiple of 256 and of the devices, which
is the same for every power of two up to 256. From any layout to any other a state is taken apart leaf by leaf on the
host, and packed anew. Which layout it has is told by its shapes, once those of the parameters are known.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from dho2_optax.eigensolver import Spectrum
from dho2_optax.packing import Layout
from dho2_optax.segments import padded_size
from dho2_optax.state import MADE_BY, DHO2State
from dho2_optax.streaming import Probing
from dho2_optax.vectors import abstract, unwrapped

Path = tuple[str, ...]


def relayout(state: Any, like: Any, params: Any) -> Any:
    r"""A saved optimizer state, laid out as `like`: for another number of devices, another split, or another rank.

    The state may come from any number of devices, packed over a mesh axis or not, with the base on segments or on whole
    leaves, and go to any other. Training goes on as if it had never stopped, in the middle of a cycle of `mr_dho2` too.

    With another rank, pairs that are added have no eigenvector yet and are the base's until the next refresh; of fewer
    pairs those with the largest :math:`|\lambda|` are kept. `mr_dho2` begins a new cycle where its rank or its `order`
    has changed.

    It works on the host, with copies of all arrays. To save and to restore is the business of Orbax, say.

    Args:
      state: the saved state of the optimizer, or a pytree that holds one: arrays that this process can read whole. The
        containers may be lists and dicts in place of named tuples, as Orbax restores them. Not a state of ``pmap``,
        which has an axis for the devices.
      like: the same pytree of a fresh start: ``tx.init(params)``, or its shapes by ``jax.eval_shape``.
      params: the parameters, or anything with their shapes and dtypes; under ``optax.masked``, with the leaves hidden
        that are hidden from the optimizer.

    Returns:
      A pytree like `like`. Arrays are placed as those of `like` are; where `like` has no placed arrays but shapes, they
      are of numpy.

    Raises:
      ValueError: if the state is of another model, base or optimizer, of another version of this package, or not
        complete; it says what differs.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> from jax.sharding import Mesh
      >>> params = {"w": jnp.ones((100, 3)), "b": jnp.ones(3)}
      >>> saved = dho2.dho2(optax.adam(0.1), rank=4).init(params)
      >>> mesh = Mesh(jax.devices()[:1], ("data",))
      >>> tx = dho2.dho2(optax.adam(0.1), rank=2, split=dho2.Split("data", mesh=mesh))
      >>> state = dho2.relayout(saved, tx.init(params), params)
      >>> [x.shape for x in saved.spectrum.eigenvectors], [x.shape for x in state.spectrum.eigenvectors]
      ([(4, 303)], [(2, 256, 3)])
    """
    saved, wanted = {p: _on_host(p, x) for p, x in _by_path(state).items()}, _by_path(like)
    params = abstract(unwrapped(params))
    moves = {
        _names(key): _repack(saved, _names(key), part, params)
        for key, part in jax.tree_util.tree_leaves_with_path(like, is_leaf=_is_ours)
        if _is_ours(part)
    }
    for path, to in wanted.items():
        if math.prod(getattr(to, "shape", (1,))) == 0:  # Orbax saves no arrays without numbers
            saved.setdefault(path, np.zeros(to.shape, to.dtype))
    _check_paths(saved, like)
    typed = jax.tree.unflatten(jax.tree.structure(like), [saved[path] for path in wanted])
    resized = jax.tree_util.tree_map_with_path(
        lambda key, part, to: moves[_names(key)].resized(part, to) if _is_ours(part) else part,
        typed,
        like,
        is_leaf=_is_ours,
    )
    return jax.tree_util.tree_map_with_path(lambda key, x, to: _placed(_names(key), x, to), resized, like)


def _is_ours(x: Any) -> bool:
    return isinstance(x, DHO2State)


def _names(key: Any) -> Path:
    """A path by names alone: a field, a key and a place in a list are the same to whoever restores a state."""
    return tuple(str(next(getattr(k, a) for a in ("name", "key", "idx") if hasattr(k, a))) for k in key)


def _by_path(tree: Any) -> dict[Path, Any]:
    return {_names(key): x for key, x in jax.tree_util.tree_leaves_with_path(tree)}


def _on_host(path: Path, x: Any) -> Any:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(f"`state` must hold arrays that this process can read, but that at {_shown(path)} is split.")
    return np.asarray(x)


class _Move(NamedTuple):
    """From one layout to another, for the parts of one optimizer state."""

    old: Layout
    new: Layout
    params: Any

    def packed(self, stack: list[np.ndarray], padding: int) -> Sequence[Any]:
        """A stack of vectors, packed anew."""
        leaves = self.old.leaves_of_rows(stack, zeros=not padding)
        return self.new.rows_of_leaves(leaves, padding)

    def resized(self, state: DHO2State, like: DHO2State) -> DHO2State:
        """`state` in the rank, the order and the form of the base of `like`."""
        rank, wanted = len(state.spectrum.eigenvalues), like.spectrum.eigenvalues.shape[0]
        leading = np.argsort(-np.abs(state.spectrum.eigenvalues), kind="stable")[:wanted]

        def pairs(x: np.ndarray) -> np.ndarray:
            kept = x[np.sort(leading)]
            return np.concatenate([kept, np.zeros((wanted - len(kept), *x.shape[1:]), x.dtype)])

        def coordinates(x: np.ndarray, to: Any) -> np.ndarray:
            return pairs(x) if (x.shape, to.shape) == ((rank,), (wanted,)) else x

        probing = state.probing
        if probing is not None and _sizes(probing) != _sizes(like.probing):
            # A new cycle, from the vectors in use, as after the last product of one.
            empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like.probing)
            probing = probing._replace(
                process=empty.process,
                found=empty.found,
                pending=np.zeros((), bool),
                complete=np.ones((), bool),
                last=pairs(probing.last),
            )
        return state._replace(
            spectrum=_resized_orthonormalizer(jax.tree.map(pairs, state.spectrum), state.spectrum, np.sort(leading)),
            subspace_state=jax.tree.map(coordinates, state.subspace_state, like.subspace_state),
            base_state=jax.tree.map(self.base_leaf, state.base_state, like.base_state),
            probing=probing,
        )

    def base_leaf(self, x: np.ndarray, like: Any) -> np.ndarray:
        """A leaf of the base's state, whole or in segment form; as it is if its shape is that of no parameter."""

        def fits(shape: tuple[int, ...], layout: Layout, param: Any) -> bool:
            return shape == param.shape or (
                layout.num_rows is not None and shape == (padded_size(param.size, layout.num_rows),)
            )

        leaves = jax.tree.leaves(self.params)
        if not any(fits(x.shape, self.old, p) and fits(like.shape, self.new, p) for p in leaves):
            return x
        flat, size = x.reshape(-1), math.prod(like.shape)
        return np.pad(flat[:size], (0, max(size - flat.size, 0))).reshape(like.shape)


def _resized_orthonormalizer(resized: Spectrum, old: Spectrum, kept: np.ndarray) -> Spectrum:
    """`resized`, of the pairs that are `kept` of an old spectrum and of new ones, with the orthonormalizer of those."""
    if old.orthonormalizer is None or resized.mask.shape == old.mask.shape:
        return resized
    lower = np.linalg.inv(np.float64(old.orthonormalizer))
    gram = np.eye(resized.mask.size)
    gram[: kept.size, : kept.size] = (lower @ lower.T)[np.ix_(kept, kept)]
    new = np.linalg.inv(np.linalg.cholesky(gram))
    return resized._replace(orthonormalizer=new.astype(old.orthonormalizer.dtype))


def _sizes(probing: Probing) -> tuple[int, ...]:
    """Rank and order of a cycle."""
    return probing.found.coefficients.shape


# What of a state is packed, and what is in its padding: factors may be divided by.
_PACKED: dict[Path, int] = {
    ("spectrum", "eigenvectors"): 0,
    ("probing", "process", "basis"): 0,
    ("factors", "values"): 1,
    ("probing", "factors", "values"): 1,
}


def _repack(saved: dict[Path, Any], path: Path, like: DHO2State, params: Any) -> _Move:
    """Replaces the packed parts of the state at `path` by those of the layout of `like`."""

    def buffers(place: Path) -> dict[Path, Any]:
        return {p: x for p, x in saved.items() if p[: len(place)] == place}

    stack, target = buffers((*path, "spectrum", "eigenvectors")), jax.tree.leaves(like.spectrum.eigenvectors)
    move = _Move(_layout("state", list(stack.values()), params), _layout("like", target, params), params)
    if move.old == move.new:
        return move
    for place, padding in _PACKED.items():
        found = buffers(path + place)
        one = place[-1] == "values"
        shapes = [x.shape[0 if one else 1 :] for x in found.values()]
        if not found or shapes != move.old.shapes:  # the factors of a metric on whole leaves
            continue
        arrays = [x[None] if one else x for x in found.values()]
        try:
            packed = move.packed(arrays, padding)
        except ValueError as error:
            where = _shown(path + place)
            raise ValueError(f"`state` must be of a model like `params`, but at {where} {error}.") from error
        for p in found:
            del saved[p]
        saved |= {(*path, *place, str(i)): x[0] if one else x for i, x in enumerate(packed)}
    return move


def _layout(name: str, stack: Sequence[Any], params: Any) -> Layout:
    """The layout of a stack of vectors like `params`, by its shapes."""
    shapes = [tuple(x.shape[1:]) for x in stack]
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    layouts = [Layout(params, None), Layout(plain, None)]
    layouts += [Layout(plain, None, num_rows=x.shape[1]) for x in stack[:1] if len(x.shape) == 3]
    for layout in layouts:
        if layout.shapes == shapes:
            return layout
    raise ValueError(
        f"`{name}` must be the state of an optimizer of `params`, but its eigenvectors are buffers of shapes {shapes}, "
        f"and those of these parameters on one device {layouts[0].shapes}. Is it of another model, or of pmap?"
    )


def _placed(path: Path, x: Any, like: Any) -> Any:
    """An array where and as that of `like` is, if it may be."""
    if not hasattr(like, "dtype"):
        return type(like)(x)
    if x.shape != like.shape or x.dtype != like.dtype:
        raise ValueError(
            f"`state` does not fit `like`: at {_shown(path)} it has {x.dtype}{list(x.shape)}, where "
            f"{like.dtype}{list(like.shape)} is wanted. It is of {_cause(path)}."
        )
    sharding = getattr(like, "sharding", None)
    if sharding is None or isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return x
    if isinstance(like, jax.Array) and not like.committed:
        return jnp.asarray(x)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # Of several processes each has the whole and makes its own shards. `device_put` would send all to all to compare.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _check_paths(saved: Mapping[Path, Any], like: Any) -> None:
    wanted = _by_path(like)
    missing = [path for path in wanted if path not in saved]
    extra = [path for path in saved if path not in wanted]
    if not (missing or extra):
        return
    said = [f"it {verb} {_some(paths)}" for verb, paths in (("lacks", missing), ("has", extra)) if paths]
    unknown = [path for path in extra if _is_unknown_field(path, like)]
    cause = "another version of dho2_optax" if unknown else _cause((missing or extra)[0])
    raise ValueError(f"`state` does not fit `like`: {', and '.join(said)}. It is of {cause}, or not complete.")


def _some(paths: list[Path]) -> str:
    return _shown(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _shown(path: Path) -> str:
    return f"`{'.'.join(path)}`"


def _cause(path: Path) -> str:
    made_by = next((MADE_BY[name] for name in path if name in MADE_BY), "model or optimizer")
    return f"another {made_by}"


def _is_unknown_field(path: Path, tree: Any) -> bool:
    """Whether a path leads to a field that a named tuple of this package does not have."""
    for name in path:
        if hasattr(tree, "_fields"):
            if name not in tree._fields:
                return type(tree).__module__.startswith("dho2_optax")
            tree = getattr(tree, name)
        elif isinstance(tree, Mapping):
            tree = {str(key): x for key, x in tree.items()}.get(name)
        elif isinstance(tree, list | tuple):
            tree = tree[int(name)] if name.isdigit() and int(name) < len(tree) else None
    return False
