"The table of modules on the contributor page is what the code does."
import ast, json, re, sys
from types import SimpleNamespace
import pytest
from conftest import project_files, root, run

package = 'fastai_selfattn'
modules = {p.stem: p for p in sorted((root/package).glob('*.py')) if not p.stem.startswith('_')}

def source(cell): return ''.join(cell['source'])

def cells(notebook): return json.loads((root/'nbs'/notebook).read_text(encoding='utf-8'))['cells']

def table():
    "The rows of the table of modules, by module"
    md = '\n'.join(source(c) for c in cells('contributing.ipynb') if c['cell_type'] == 'markdown')
    rows = re.findall(r'^\| (\d+) \| (.+?) \| `(\w+)` \| .+ \| (.+?) \|$', md, re.M)
    res = {m: SimpleNamespace(level=int(level), notebook=nb, may=may.split(', ')) for level,nb,m,may in rows}
    for row in res.values():
        if 'all above' in row.may: row.may += [m for m,r in res.items() if r.level < row.level]
    return res

rows = table()

def imports(path):
    "What a module imports: `ops` for a module of ours, `torch` for another library"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, [package if node.level else '', node.module]))
            names = [f'{base}.{a.name}' for a in node.names] if base == package else [base]
        else: continue
        for name in names:
            top,_,rest = name.partition('.')
            yield rest.split('.')[0] if top == package else top

def others(path): return {m for m in imports(path) if m and not m.startswith('__') and m not in sys.stdlib_module_names}


def test_every_module_has_a_row(): assert set(rows) == set(modules)

@pytest.mark.parametrize('module', modules)
def test_imports_are_in_the_table(module): assert others(modules[module]) <= set(rows[module].may)

@pytest.mark.parametrize('module', rows)
def test_imports_point_to_a_lower_level(module):
    for other in rows.keys() & set(rows[module].may): assert rows[other].level < rows[module].level

@pytest.mark.parametrize('module', [m for m,r in rows.items() if r.notebook != 'hand-written'])
def test_notebook_of_a_row_makes_the_module(module):
    made = [m for c in cells(rows[module].notebook+'.ipynb') for m in re.findall(r'^#\| *default_exp:? +(\S+)', source(c), re.M)]
    assert made == [module]

def test_requirements_are_what_is_imported():
    imported = set().union(*map(others, modules.values())) - set(modules)
    imported = {{'PIL': 'pillow'}.get(m, m) for m in imported}
    ini = (root/'settings.ini').read_text(encoding='utf-8')
    required = re.search(r'^requirements =\n((?: +.+\n)+)', ini, re.M)[1].split()
    assert imported == {re.split('[<>=]', r)[0] for r in required}

@pytest.mark.parametrize('module', modules)
def test_no_star_imports(module):
    nodes = ast.walk(ast.parse(modules[module].read_text(encoding='utf-8')))
    assert '*' not in [a.name for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names]

def test_only_learner_patches():
    "Import the modules after all of fastai, from the lowest level up, and look at the classes of fastai and PyTorch after each"
    code = f'''
from fastai.vision.all import Callback, DynamicUnet, Learner, UnetBlock
import fastai.layers, importlib, sys, torch

classes = [Learner, Callback, DynamicUnet, UnetBlock, fastai.layers.SelfAttention, torch.Tensor, torch.nn.Module, fastai.layers]
def state(): return {{(c.__name__, k): v for c in classes for k,v in vars(c).items() if not k.startswith('__')}}

before = state()
for m in {sorted(modules, key=lambda m: rows[m].level)!r}:
    importlib.import_module(f'{package}.{{m}}')
    for (c,k),v in state().items():
        if before.get((c,k)) is v: continue
        assert '{package}.learner' in sys.modules, f'importing {{m}} changes {{c}}.{{k}}'
        assert getattr(v, '__module__', None) == '{package}.learner', f'{{c}}.{{k}} is not set by learner'
'''
    run(sys.executable, '-c', code, cwd=root)

def test_no_paths_of_one_machine():
    found = []
    for f in project_files():
        try: text = (root/f).read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        found += [f'{f}:{i}: {l.strip()[:100]}' for i,l in enumerate(text.splitlines(), 1)
                  if '"image/png"' not in l and re.search('/(root|work|home|tmp)/', l)]
    assert not found, '\n'.join(found)
