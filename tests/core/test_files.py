"""Files that can't be read or written are bad input that names them; what else goes wrong is not."""

import json

import pytest

from lora_jax.core import files
from lora_jax.core.errors import FileError, InputError, MissingError


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, MissingError, r"there is no file .*a\.json"),
        (b"\xff", InputError, r"a\.json is not UTF-8 text: "),
        (b"{", InputError, r"a\.json is not JSON: "),
        (b"[" * 100_000, InputError, r"a\.json is not JSON: "),
        (b"[1]", InputError, r"a\.json must hold a JSON object, not list"),
    ],
)
def test_json_objects(tmp_path, content, kind, message):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(kind, match=message):
        files.read_json_object(file)


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert files.read_json_object(tmp_path / "a.json") == {"a": 1}


def test_what_the_system_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"below can't be written: Not a directory"):
        files.write(tmp_path / "file" / "below", b"")
    with pytest.raises(FileError, match=r"below can't be written: "), files.fresh_directory(tmp_path / "file" / "below"):
        pass
    with pytest.raises(FileError, match=r"can't be read: Is a directory"), files.reading(tmp_path):
        tmp_path.read_text()


def test_a_bug_is_no_bad_input(tmp_path):
    for used in (files.reading, files.writing, files.fresh_directory):
        with pytest.raises(ValueError, match="a bug") as error, used(tmp_path / "a"):
            raise ValueError("a bug")
        assert not isinstance(error.value, InputError) and not (tmp_path / "a").exists()
