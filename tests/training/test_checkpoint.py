"""Checkpoints: bit for bit, on any mesh, only for the model they belong to."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from onerec_jax.errors import InputError
from onerec_jax.sharding import make_mesh
from onerec_jax.training import checkpoint
from onerec_jax.training.checkpoint import Checkpoints
from onerec_jax.training.step import TrainState


def make_state(mesh, *, step=0, seed=0, codebook=6, layers=2):
    """A state in the shape of a real one: scanned experts over `expert`, a head, a router."""
    rng = np.random.default_rng(seed)

    def put(values, *axes):
        return jax.device_put(values, NamedSharding(mesh, P(*axes)))

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    def weights():
        return {
            "decoder": {
                "w_in": put(rng.standard_normal((layers, 8, 3), np.float32), None, "expert")
            },
            "heads": put(rng.standard_normal((3, 4, codebook), np.float32)),
        }

    router = {"bias": put(draw(layers, 8))}
    moments = (weights(), put(np.int32(step)))
    return TrainState(put(np.int32(step)), weights(), router, moments)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture
def mesh():
    return make_mesh(8, 1)


class Waiting(Checkpoints):
    """Waits for every save, so that the folder may be looked at and opened again."""

    def save(self, *args, **kwargs):
        super().save(*args, **kwargs)
        self.wait()


@pytest.fixture
def opened(tmp_path):
    """Opens checkpoints of `tmp_path / "c"` and closes them in the end."""
    found = []

    def open_(folder=tmp_path / "c"):
        found.append(Waiting(folder))
        return found[-1]

    yield open_
    for checkpoints in found:
        checkpoints.close()


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8), (1, 1)])
def test_round_trip_bit_for_bit_on_every_mesh(opened, mesh, shape):
    state, checkpoints = make_state(mesh, step=20), opened()
    note = {"progress": {"best_step": 20, "best_score": 0.25}, "list": [1, 2]}
    checkpoints.save(state, note=note, score=0.25)

    other = make_mesh(*shape)
    again = opened()
    restored = again.restore(abstract(make_state(other, seed=9)))
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state), strict=True)
    assert restored.params["decoder"]["w_in"].sharding.is_equivalent_to(
        NamedSharding(other, P(None, "expert")), 3
    )
    assert restored.step.sharding.mesh.shape == other.shape
    assert again.load_note() == note
    assert again.latest == 20


def test_latest_and_best_stay(opened, mesh):
    checkpoints = opened()
    scores = {10: 0.1, 20: 0.5, 30: 0.3, 40: 0.4}
    for step, score in scores.items():
        note = {"step": step}
        checkpoints.save(make_state(mesh, step=step), note=note, score=score)
    steps = {int(p.name) for p in checkpoints.folder.iterdir() if p.name.isdigit()}
    assert steps == {20, 40}
    assert checkpoints.latest == 40
    assert checkpoints.load_note() == {"step": 40}
    assert checkpoints.load_note(20) == {"step": 20}
    restored = opened().restore(abstract(make_state(mesh)), 20)
    assert int(restored.step) == 20


@pytest.mark.parametrize("low", [0.0, float("-inf")])
def test_of_equal_scores_the_first_is_the_best(opened, mesh, low):
    """As in `Progress`, which takes only a better score for a new best."""
    checkpoints = opened()
    for step, score in {10: 0.0, 20: 0.0, 30: low, 40: low}.items():
        checkpoints.save(make_state(mesh, step=step), note={}, score=score)
    assert {int(p.name) for p in checkpoints.folder.iterdir() if p.name.isdigit()} == {10, 40}


def test_the_same_step_can_be_saved_again(opened, mesh):
    """A resumed run reaches steps that an interrupted one has saved."""
    checkpoints = opened()
    for seed in (0, 1):
        state = make_state(mesh, step=10, seed=seed)
        checkpoints.save(state, note={"seed": seed}, score=0.1)
    assert checkpoints.load_note() == {"seed": 1}
    restored = checkpoints.restore(abstract(state))
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))


def test_a_model_for_others(tmp_path, mesh):
    """Weights alone, on another mesh; their digest is that of their bits, on every mesh."""
    state, folder = make_state(mesh, seed=3), tmp_path / "weights"
    checkpoint.save_model(folder, state.variables)
    other = make_state(make_mesh(1, 8), seed=9)
    loaded = checkpoint.load_model(folder, abstract(other.variables))
    chex.assert_trees_all_equal(jax.device_get(loaded), jax.device_get(state.variables))
    assert loaded["params"]["heads"].sharding.is_equivalent_to(other.params["heads"].sharding, 3)
    assert checkpoint.digest(loaded) == checkpoint.digest(state.variables) < 2**32
    assert checkpoint.digest(other.variables) != checkpoint.digest(loaded)

    wider = make_state(mesh, codebook=7).variables
    with pytest.raises(InputError, match="of another model or codebook .params/heads: "):
        checkpoint.load_model(folder, abstract(wider))
    with pytest.raises(InputError, match="the weights in .* cannot be read"):
        checkpoint.load_model(tmp_path / "none", abstract(wider))


def test_restore_model_reads_only_the_model(opened, mesh):
    state = make_state(mesh, step=10)
    checkpoints = opened()
    checkpoints.save(state, note={}, score=0.0)
    parts = {path.name for path in (checkpoints.folder / "10").iterdir() if path.is_dir()}
    assert {"model", "optimizer"} <= parts
    shutil.rmtree(checkpoints.folder / "10" / "optimizer")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state.variables
    )
    variables = opened().restore_model(wanted)
    chex.assert_trees_all_equal(jax.device_get(variables), jax.device_get(state.variables))
    assert variables["params"]["heads"].devices() == {jax.devices()[3]}


@pytest.mark.parametrize(
    ("changes", "leaf", "shapes"),
    [
        ({"codebook": 7}, "params/heads", ("(3, 4, 6)", "(3, 4, 7)")),
        ({"layers": 3}, "params/decoder/w_in", ("(2, 8, 3)", "(3, 8, 3)")),
    ],
)
def test_another_model_or_codebook_is_refused(opened, mesh, changes, leaf, shapes):
    checkpoints = opened()
    checkpoints.save(make_state(mesh, step=10), note={}, score=0.0)
    other = abstract(make_state(mesh, **changes))
    for load in (
        lambda: checkpoints.restore(other),
        lambda: checkpoints.restore_model(other.variables),
    ):
        with pytest.raises(InputError) as error:
            load()
        for part in (leaf, *shapes, str(checkpoints.folder), "--run"):
            assert part in str(error.value)


@pytest.mark.parametrize("stored_has_it", [True, False])
def test_a_missing_or_extra_leaf_is_refused(opened, mesh, stored_has_it):
    """Such as a model with experts against one without."""
    big, small = make_state(mesh, step=10), make_state(mesh, step=10)
    small = small.replace(router={}, params={"heads": small.params["heads"]})
    stored, wanted = (big, small) if stored_has_it else (small, big)
    checkpoints = opened()
    checkpoints.save(stored, note={}, score=0.0)
    with pytest.raises(InputError, match="params/decoder/w_in"):
        checkpoints.restore(abstract(wanted))


def test_nothing_to_restore(opened, mesh, tmp_path):
    checkpoints = opened()
    assert checkpoints.latest is None
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoints.restore_model(abstract(make_state(mesh)).variables)


def test_folders_of_killed_saves_are_cleaned(opened, mesh, tmp_path):
    """Orbax writes beside the step under a name of its own and renames in the end."""
    # One at a time: each cleans when it is opened, and would take the other's save for a dead one.
    state, folder = make_state(mesh, step=10), tmp_path / "c"
    opened(folder).save(state, note={"step": 10}, score=0.0)
    shutil.copytree(folder / "10", folder / "20.orbax-checkpoint-tmp")
    (folder / "20.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    again = opened()
    assert again.latest == 10
    restored = again.restore(abstract(state))
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
    again.save(make_state(mesh, step=30), note={}, score=1.0)
    assert {path.name for path in folder.iterdir()} == {"30"}


def test_note_is_plain_json(opened, mesh):
    checkpoints = opened()
    note = {"progress": {"best_score": float("-inf"), "best_step": 0}}
    checkpoints.save(make_state(mesh, step=10), note=note, score=float("-inf"))
    assert json.dumps(opened().load_note()) == json.dumps(note)


def test_a_save_under_way_is_waited_for(tmp_path, mesh):
    """By whoever asks for the latest, and by the next save; donated buffers may go at once."""
    checkpoints, state = Checkpoints(tmp_path / "c"), make_state(mesh, step=10)
    expected = jax.device_get(state)
    checkpoints.save(state, note={"n": 1}, score=0.5)
    jax.tree.map(lambda x: x.delete(), state)
    assert checkpoints.latest == 10
    checkpoints.save(make_state(mesh, step=20), note={"n": 2}, score=0.1)
    checkpoints.save(make_state(mesh, step=30), note={"n": 3}, score=0.2)
    assert checkpoints.load_note() == {"n": 3}
    restored = checkpoints.restore(abstract(make_state(mesh, step=10)), 10)
    chex.assert_trees_all_equal(jax.device_get(restored), expected)
    checkpoints.close()
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"10", "30"}


# ---------------------------------------------------------------------------------------- damage


def stored(folder, leaf):
    """The file of a step that holds an array, and where in it."""
    wanted = leaf.tobytes()[:64]
    found = {path: path.read_bytes().find(wanted) for path in folder.rglob("d/*")}
    ((path, place),) = [(path, place) for path, place in found.items() if place >= 0]
    return path, place


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_a_flipped_bit_is_refused_by_name(opened, mesh, what):
    """Nothing else could tell: the value is a number as any other."""
    state, checkpoints = make_state(mesh, step=10), opened()
    # Small arrays lie in Orbax's tables, which have checksums, and what compresses is not found.
    leaf = np.random.default_rng(1).integers(0, 2**31, (100, 100), np.int32)
    tree = state.params if what == "model" else state.opt_state[0]
    tree["heads"] = jax.device_put(leaf, tree["heads"].sharding)
    checkpoints.save(state, note={}, score=0.0)
    flip(*stored(checkpoints.folder / "10", leaf))
    again = opened()
    with pytest.raises(InputError, match=rf"{what}/.*heads differs from what was saved"):
        again.restore(abstract(state))
    if what == "optimizer":  # which serving does not read
        variables = again.restore_model(abstract(state).variables)
        chex.assert_trees_all_equal(jax.device_get(variables), jax.device_get(state.variables))


def test_checkpoints_without_digests_are_read(opened, mesh):
    state, checkpoints = make_state(mesh, step=10), opened()
    checkpoints.save(state, note={"a": 1}, score=0.0)
    path = checkpoints.folder / "10" / "_CHECKPOINT_METADATA"
    table = json.loads(path.read_text())
    del table["custom_metadata"]["digests"]
    path.write_text(json.dumps(table))
    again = opened()
    chex.assert_trees_all_equal(jax.device_get(again.restore(abstract(state))), state)
    assert again.load_note() == {"a": 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_digests_of_device_and_host_agree(mesh, dtype):
    rng = np.random.default_rng(0)
    host = (rng.standard_normal((8, 6)) * 100).astype(jax.numpy.dtype(dtype))
    on_mesh = jax.device_put(host, NamedSharding(mesh, P("data")))
    (found,) = checkpoint._on_device([on_mesh]).tolist()
    bits = host.view(f"uint{8 * host.dtype.itemsize}").ravel().tolist()
    assert found == sum(bits) % 2**32
    assert checkpoint._digests([on_mesh]) == [found]
    assert checkpoint._digests({"a": 3, "b": np.float32(0)}) == [3, 0]
