"Every notebook runs from top to bottom and leaves nothing behind: as its reader will run it, but for three that train for less here."
import json
import pytest
from conftest import changed, contents, copy_project, root
from processes import forks, nbdev_test

# The tutorials first: they train longest, and nobody shall wait for one alone at the end.
notebooks = sorted((p.relative_to(root).as_posix() for p in (root/'nbs').rglob('*.ipynb')
                    if not any(part.startswith(('_', '.')) for part in p.relative_to(root).parts)), reverse=True)

# Pages that train for minutes to have something to show train here for less; before a release they run as they are (release.yml).
SHORTER = {'nbs/tutorials/find_the_walls.ipynb': {'n=400':'n=120'},
           'nbs/tutorials/see_attention.ipynb': {'fit_one_cycle(8,':'fit_one_cycle(4,'},
           'nbs/howto/open_the_explorer.ipynb': {'n=1000':'n=100', 'fit_one_cycle(3,':'fit_one_cycle(1,'}}

def shorten(file, changes):
    "Replace texts of a notebook's code, each of which stands there once"
    nb = json.loads(file.read_text())
    for old,new in changes.items():
        cell, = (c for c in nb['cells'] if c['cell_type'] == 'code' and old in ''.join(c['source']))
        cell['source'] = ''.join(cell['source']).replace(old, new)
    file.write_text(json.dumps(nb))

def test_pages_that_are_shortened_run_as_they_are_before_a_release():
    ran = [line.split()[1] for line in (root/'.github/workflows/release.yml').read_text().splitlines() if line.split()[:1] == ['nbdev-test']]
    assert ran and all(any(page == r or page.startswith(f'{r}/') for r in ran) for page in SHORTER)

@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    folder = copy_project(tmp_path_factory.mktemp('notebooks')/'checkout')
    for notebook,changes in SHORTER.items(): shorten(folder/notebook, changes)
    return folder

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
