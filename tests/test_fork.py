"""A child made by fork computes what its parent does, after threads have run in the parent."""

import multiprocessing
import subprocess
import sys

import pytest

from fastbert import native

SCRIPT = """
import multiprocessing
import torch
from fastbert import BertConfig, BertModel, machine

torch.manual_seed(0)
torch.set_num_threads(2)
config = BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
model = BertModel(config).eval()
ids = torch.randint(5, 99, (40, 30))

@torch.inference_mode()
def states():
    return model(input_ids=ids).last_hidden_state

parent = states()

def child(queue):
    queue.put((torch.equal(states(), parent), torch.get_num_threads()))

context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
process = context.Process(target=child, args=(queue,), daemon=True)
process.start()
process.join(60)
assert process.exitcode == 0, f"the child had not ended after a minute: {process.exitcode}"
print(*queue.get(), min(2, machine.cpu().usable))
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
@pytest.mark.skipif(not native.available(), reason="the native extension was not built")
def test_a_forked_child_runs_on_one_thread_and_ends():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    same, threads, threads_of_parent = done.stdout.split()
    assert same == "True"
    assert threads == "1" or threads_of_parent == "1"
