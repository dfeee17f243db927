#!/bin/sh
# What the images and the Apptainer definition install, run in the folder of setup.py:
#   sh docker/install.sh [INDEX]
# /opt/venv with the packages of constraints.txt over those of the image, a user, and folders that any user may write.
# A torch that the image brings stays; where it brings none, torch comes from PyPI or from INDEX.
set -eu

# Over the image's packages, not in their place: what NVIDIA built against its own versions still finds them outside.
python3 -m venv --without-pip --system-site-packages /opt/venv

# NVIDIA's image holds pip to the versions it was built with, by PIP_CONSTRAINT.
unset PIP_CONSTRAINT
pins=$(mktemp)
brought=$(python3 -c 'from importlib.metadata import distributions
print(*{distribution.version for distribution in distributions(name="torch")})')
if [ -n "$brought" ]; then
    grep -v '^torch==' constraints.txt > "$pins"
    echo "torch==$brought" >> "$pins"
else
    cat constraints.txt > "$pins"
fi
# DS_BUILD_OPS=0: DeepSpeed's own kernels are compiled at first use, if ever, not here.
DS_BUILD_OPS=0 /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
    ${1:+--extra-index-url "$1"} -c "$pins" -e .
rm "$pins"

if [ -n "$brought" ]; then
    test -z "$(find /opt/venv/lib -maxdepth 4 -path '*/site-packages/torch')" || { echo "pip replaced torch $brought"; exit 1; }
    # The image's own torchrun starts ranks on a Python that does not see /opt/venv.
    printf '#!/opt/venv/bin/python\nfrom torch.distributed.run import main\n\nmain()\n' > /opt/venv/bin/torchrun
    chmod 755 /opt/venv/bin/torchrun
fi

# Under `docker run --user`, as in Apptainer, the user is any number.
if ! id slope > /dev/null 2>&1; then useradd --create-home --uid 10001 slope; fi
chmod 1777 /home/slope
mkdir -p runs data exports
chmod 1777 runs data exports
