# A kernel engineer who wants laver_kernels alone: an environment of its own, the examples, the machine code.
python -m venv --without-pip env
python -c "import site; print(*site.getsitepackages(), sep='\n')" > "$(env/bin/python -c 'import site; print(site.getsitepackages()[0])')/torch.pth"
python -m pip --quiet --python env/bin/python install --no-index --no-build-isolation "$ROOT/kernels"
env/bin/python -c "import laver_kernels; print(laver_kernels.__file__)"
for example in "$ROOT"/kernels/examples/*.py; do env/bin/python "$example"; done
