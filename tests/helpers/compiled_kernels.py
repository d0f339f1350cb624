"""What becomes of the Triton kernels of some cases, as JSON: in a process without the tests' interpreter.

    compiled_kernels.py CAPABILITY DTYPE TOKENS,WIDTH,HIDDEN,EXPERTS,K,ACTIVATION ...

For each case a list of kernels: name, constants, what `Code` tells, all by the hash of the machine code.
"""

import json
import sys
from functools import cache
from hashlib import sha256

import torch

from benchmarks.gpu_code import Code, code_of, compiled_case
from benchmarks.gpu_contestants import Case
from sparsegate.moe.kernels.triton.ahead import Compiled


def main() -> None:
    capability, dtype, *cases = sys.argv[1:]
    kernels: dict[str, Compiled] = {}

    @cache
    def code(key: str) -> Code:
        return code_of(kernels[key], int(capability))

    found = []
    for case in cases:
        *sizes, activation = case.split(",")
        made = compiled_case(Case(*map(int, sizes), activation), int(capability), getattr(torch, dtype))
        by_key = {sha256(each.assembly["cubin"]).hexdigest(): each for each in made}
        kernels |= by_key
        found.append({key: (of.name, of.constants, code(key)._asdict()) for key, of in by_key.items()})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
