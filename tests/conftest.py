"""Settings that must be in place before torch, Triton and the Hugging Face libraries are imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the network: a hub id that does not exist fails at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow tests several times on few cores
os.environ.setdefault("GOMP_SPINCOUNT", "100")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads cost more than they give

import torch  # noqa: E402  (it reads the lines above, and imports no Triton)

# Triton reads it once, when it is first imported, and diffusers and peft import it: with a device kernels are compiled,
# without one they run through Triton's interpreter. Subprocesses inherit it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
