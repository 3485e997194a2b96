"""Write README.md from nbs/index.ipynb, the front page of the documentation, and the picture that both show from the first tutorial.

python scripts/readme.py            write README.md and the picture
python scripts/readme.py --check    write nothing, fail if one of them is not what would be written"""
import argparse, base64, json, posixpath, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
index, readme = root/'nbs/index.ipynb', root/'README.md'
tutorial, picture = root/'nbs/tutorials/first_layer.ipynb', root/'nbs/images/paint_by_swatch.png'

fenced = re.compile(r'(^```.*?^```)', re.M|re.S)
link = re.compile(r'(\]\(|\bsrc="|\bhref=")(?![a-z]+:|#|/)([^)\s"]+)')
ansi = re.compile(r'\x1b\[[0-9;]*m')

def joined(text): return text if isinstance(text, str) else ''.join(text)

def directives_and_body(source):
    lines = source.splitlines()
    n = next((i for i,l in enumerate(lines) if not l.startswith('#|')), len(lines))
    return [l[2:].strip() for l in lines[:n]], '\n'.join(lines[n:]).strip()

def from_root(md):
    "Links in `md` that are relative to nbs/, made relative to the repository root; code blocks untouched"
    def fix(m): return m[1] + posixpath.normpath(posixpath.join('nbs', m[2]))
    return ''.join(s if s.startswith('```') else link.sub(fix, s) for s in fenced.split(md))

def output_md(out):
    "Markdown for one cell output; a plot is left to the documentation site"
    if out['output_type'] == 'stream': return f"```\n{joined(out['text']).rstrip()}\n```"
    data = out.get('data', {})
    if any(k.startswith('image/') for k in data): return ''
    if 'text/markdown' in data: return from_root(joined(data['text/markdown']).strip())
    if 'text/plain' in data: return f"```\n{ansi.sub('', joined(data['text/plain'])).rstrip()}\n```"
    return ''

def cell_md(cell):
    directives, body = directives_and_body(joined(cell['source']))
    if cell['cell_type'] == 'raw' or 'hide' in directives or not body: return []
    if cell['cell_type'] == 'markdown': return [from_root(body)]
    return [f'```python\n{body}\n```', *map(output_md, cell['outputs'])]

def cells(notebook): return json.loads(notebook.read_text(encoding='utf-8'))['cells']

def readme_md():
    return '\n\n'.join(part for cell in cells(index) for part in cell_md(cell) if part) + '\n'

def picture_png():
    "The plot of the tutorial's cell that is labelled `fig-front`"
    cell, = (c for c in cells(tutorial) if 'label: fig-front' in directives_and_body(joined(c['source']))[0])
    png, = (out['data']['image/png'] for out in cell['outputs'] if 'image/png' in out.get('data', {}))
    return base64.b64decode(joined(png))

def main():
    parser = argparse.ArgumentParser(description='Write README.md from nbs/index.ipynb, and the picture in it from the first tutorial')
    parser.add_argument('--check', action='store_true', help='write nothing, fail if README.md or the picture would change')
    check = parser.parse_args().check
    for path,source,new in ((readme, index, readme_md().encode()), (picture, tutorial, picture_png())):
        if path.exists() and path.read_bytes() == new: continue
        if check: sys.exit(f'{path.relative_to(root)} is not what {source.relative_to(root)} says: run `python scripts/readme.py`')
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(new)

if __name__ == '__main__': main()
