"""What stages share."""

import pytest

from experiments.stage import follow_up, held
from onerec_jax.errors import InputError


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with held(tmp_path):
        with pytest.raises(InputError, match="another process trains"), held(tmp_path):
            pass
        with pytest.raises(InputError), held(tmp_path):  # still
            pass
    with held(tmp_path):
        pass


def test_commands_are_for_the_shell(tmp_path):
    assert follow_up("evaluate", tmp_path / "a b").endswith("/a b'")
