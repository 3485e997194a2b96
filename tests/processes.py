"""What tests run in a process of its own, started in no time: forked from one that has imported what takes longest

This module imports nothing of fastai or of the package, since the new process imports what it needs.
"""
import contextlib, io, multiprocessing, os, socket, sys, tempfile
from multiprocessing.connection import wait
from pathlib import Path

# Not fastai: its modules patch `Learner`, and a notebook that lacks an import of them shall fail in the tests as it would for its reader.
forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(['torchvision', 'torch._dynamo', 'pandas', 'scipy.stats', 'sklearn', 'matplotlib.pyplot', 'IPython', 'nbdev.test', 'wandb',
                              'timm', 'plum'])

def nbdev_test(notebook, folder, log):
    "The command `nbdev-test` in `folder`, its output in the file `log`"
    out = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    for fd in (1, 2): os.dup2(out, fd)
    os.chdir(folder)
    tempfile.tempdir = tempfile.mkdtemp(dir=Path(log).parent)     # a page may leave its temporary files; pytest takes them away
    from nbdev.test import nbdev_test
    nbdev_test(notebook)

def _run(text, argv, folder, log, env):
    out = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    for fd in (1, 2): os.dup2(out, fd)
    os.chdir(folder)
    os.environ.update(env)
    sys.path[:0] = ['', *filter(None, env.get('PYTHONPATH', '').split(os.pathsep))]
    sys.argv = ['-c', *map(str, argv)]
    exec(compile(text, '<text>', 'exec'), {'__name__': '__main__'})

def started(text, *argv, folder, log, env={}):
    "A process that runs `text` in `folder`, with all that it prints in the file `log`; Ctrl-C ends it as any other, also where pytest ignores it"
    interrupts = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n'
    process = forks.Process(target=_run, args=(interrupts+text, argv, folder, log, env))
    process.start()
    return process

def _wait_for(processes):
    "Start them all; end the others when one fails, since they might wait for it"
    for p in processes: p.start()
    running = processes
    while running:
        wait([p.sentinel for p in running])
        for p in running: p.join(0)
        if any(p.exitcode for p in processes):
            for p in running: p.terminate()
        running = [p for p in running if p.exitcode is None]

def python(text, *argv, folder, n=1, **env):
    """What Python prints when it runs `text` in `folder`: as a single process, or in each of `n` that find one another as those of torchrun do

    None of fastai or of the package is imported before `text` does. `ChildProcessError` with all that was printed if one fails.
    """
    if n > 1:
        with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
        env |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n))
    def own(rank): return env | (dict(RANK=str(rank), LOCAL_RANK=str(rank)) if n > 1 else {})
    with tempfile.TemporaryDirectory() as logs:
        processes = [forks.Process(target=_run, args=(text, argv, folder, Path(logs)/str(rank), own(rank))) for rank in range(n)]
        _wait_for(processes)
        said = ''.join((Path(logs)/str(rank)).read_text() for rank in range(n))
    if any(p.exitcode for p in processes): raise ChildProcessError(said[-20000:])
    return said

def send_extra(connection, *words):
    "The MiB that `peak_extra` reads from its fresh process, or the words with which that ends"
    from fastai_selfattn.bench.measure import _child
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out: _child(*map(str, words))
        connection.send(float(out.getvalue()))
    except SystemExit as e: connection.send(str(e))

def extra(*words):
    "`send_extra` in a process of its own"
    here,there = forks.Pipe(duplex=False)
    process = forks.Process(target=send_extra, args=(there, *words))
    process.start()
    there.close()
    with here: said = here.recv()     # EOFError if the process died
    process.join()
    return said
