import pytest
from run_files import write_run


@pytest.fixture
def new_run(tmp_path):
    """Writes a run directory of that name below a temporary folder."""
    return lambda name="fbi-ad", **options: write_run(tmp_path / name, name, **options)
