"""Run the quick tests; exit status 1 if they take over 20 times the processor time of `import
torch`, child processes included. Machines differ in speed, less so in this ratio."""

import os
import resource
import statistics
import subprocess
import sys

AIM = 13
LIMIT = 20


def processor_seconds(*arguments):
    """Processor time of Python with these arguments and of its children; exits if that fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.returncode)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with which all is compiled every time
processor_seconds("-c", "import torch")  # as it is the first time, in any case
processor_seconds("-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider")
imports = [processor_seconds("-c", "import torch") for _ in range(3)]
for _ in range(2):  # a second time before it ends red, as something else may have been running
    tests = processor_seconds("-m", "pytest", "-q", "-p", "no:cacheprovider", *sys.argv[1:])
    ratio = tests / statistics.median(imports)
    print(
        f"quick tests: {tests:.0f} s of processor time, {ratio:.1f} times that of `import torch` "
        f"(aim {AIM}, at most {LIMIT})"
    )
    if ratio <= LIMIT:
        sys.exit(0)
sys.exit(1)
