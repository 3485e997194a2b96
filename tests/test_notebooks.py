"Every notebook runs from top to bottom, as its reader will run it, and leaves nothing behind."
import pytest
from conftest import bin_dir, changed, contents, copy_project, root, run

notebooks = sorted(p.relative_to(root).as_posix() for p in (root/'nbs').rglob('*.ipynb')
                   if not any(part.startswith(('_', '.')) for part in p.relative_to(root).parts))

@pytest.fixture(scope='module')
def checkout(tmp_path_factory): return copy_project(tmp_path_factory.mktemp('notebooks')/'checkout')

@pytest.mark.parametrize('notebook', notebooks)
def test_notebook(notebook, checkout):
    before = contents(checkout)
    out = run(bin_dir/'nbdev-test', notebook, cwd=checkout)
    assert 'Success.' in out
    left_behind = changed(before, contents(checkout))
    assert not left_behind
