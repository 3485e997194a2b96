"For `test_notebooks`, in a module that imports nothing of fastai, since the new process imports it"
import os

def nbdev_test(notebook, folder, log):
    "The command `nbdev-test` in `folder`, its output in the file `log`"
    out = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    for fd in (1, 2): os.dup2(out, fd)
    os.chdir(folder)
    from nbdev.test import nbdev_test
    nbdev_test(notebook)
