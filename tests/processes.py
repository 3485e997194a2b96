"""What tests run in a process of its own, started in no time: forked from one that has imported what takes longest

This module imports nothing of fastai or of the package, since the new process imports what it needs.
"""
import contextlib, io, multiprocessing, os

# Not fastai: its modules patch `Learner`, and a notebook that lacks an import of them shall fail in the tests as it would for its reader.
forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(['torchvision', 'torch._dynamo', 'pandas', 'scipy.stats', 'sklearn', 'matplotlib.pyplot', 'IPython', 'nbdev.test'])

def nbdev_test(notebook, folder, log):
    "The command `nbdev-test` in `folder`, its output in the file `log`"
    out = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    for fd in (1, 2): os.dup2(out, fd)
    os.chdir(folder)
    from nbdev.test import nbdev_test
    nbdev_test(notebook)

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
