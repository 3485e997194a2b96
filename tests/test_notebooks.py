"Every notebook runs from top to bottom, as its reader will run it, and leaves nothing behind."
import pytest
from conftest import changed, contents, copy_project, root
from processes import forks, nbdev_test

# The tutorials first: they train longest, and nobody shall wait for one alone at the end.
notebooks = sorted((p.relative_to(root).as_posix() for p in (root/'nbs').rglob('*.ipynb')
                    if not any(part.startswith(('_', '.')) for part in p.relative_to(root).parts)), reverse=True)

@pytest.fixture(scope='module')
def checkout(tmp_path_factory): return copy_project(tmp_path_factory.mktemp('notebooks')/'checkout')

@pytest.mark.parametrize('notebook', notebooks)
def test_notebook(notebook, checkout, tmp_path):
    before = contents(checkout)
    process = forks.Process(target=nbdev_test, args=(notebook, checkout, tmp_path/'log'))
    process.start()
    process.join()
    out = (tmp_path/'log').read_text()
    if process.exitcode: pytest.fail(f'nbdev-test {notebook}\n{out[-20000:]}', pytrace=False)
    assert 'Success.' in out
    left_behind = changed(before, contents(checkout))
    assert not left_behind
