"""The reference configurations say on top what they are, and it is true."""

import pytest

from benchmarks.reference_headers import FOLDER, body, header


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_header_tells_the_sizes_of_what_is_built(file):
    assert file.read_text() == header(file) + body(file.read_text()), (
        "write it anew: python -m benchmarks.reference_headers"
    )
