"""The headers of the reference configurations match the models that are built from them."""

import pytest

from benchmarks.reference_headers import FOLDER, body, header


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_header_matches_the_configuration(file):
    assert file.read_text() == header(file) + body(file.read_text()), "run python -m benchmarks.reference_headers"
