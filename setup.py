from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

ini = ConfigParser(delimiters='=', interpolation=None)
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

def lines(key): return cfg[key].strip().splitlines()

def minor(key): return int(cfg[key].split('.')[1])

setup(
    name=cfg['lib_name'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    license_expression=cfg['license'],
    python_requires=f">={cfg['min_python']}",
    classifiers=[
        f"Development Status :: {cfg['status']}",
        f"Intended Audience :: {cfg['audience']}",
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Programming Language :: Python :: 3 :: Only',
        *[f'Programming Language :: Python :: 3.{i}' for i in range(minor('min_python'), minor('max_python')+1)],
    ],
    install_requires=lines('requirements'),
    extras_require={'dev': lines('dev_requirements')},
    entry_points={
        'console_scripts': lines('console_scripts'),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
