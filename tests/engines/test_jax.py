"""What a JAX user relies on: arrays stay where they are, on however many devices."""

import os
import subprocess
import sys

FOUR_DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np, multiopt as mo
from jax.sharding import NamedSharding, PartitionSpec

devices = jax.devices()
opt = mo.Optimizer(mo.Adam(lr=0.1))

# An uncommitted array stays on its device and uncommitted, whatever the default is.
for made, stepped in ((0, 2), (2, 0)):
    with jax.default_device(devices[made]):
        w, g = jnp.zeros(8), jnp.ones(8)
    for _ in range(2):
        with jax.default_device(devices[stepped]):
            w = opt.step({f"w{made}": w}, {f"w{made}": g})[f"w{made}"]
        assert w.devices() == {devices[made]} and not w.committed
        slot = opt.state(f"w{made}").slots["exp_avg"]
        assert slot.devices() == {devices[made]}
    opt.load_state_dict(opt.state_dict())
    assert opt.state(f"w{made}").slots["exp_avg"].devices() == {devices[made]}

# A committed and a sharded array keep their placement.
spread = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x"))
for sharding in (jax.sharding.SingleDeviceSharding(devices[3]), spread):
    name = str(sharding)
    p = jax.device_put(np.zeros(8, np.float32), sharding)
    g = jax.device_put(np.ones(8, np.float32), sharding)
    for _ in range(2):
        p = opt.step({name: p}, {name: g})[name]
    assert p.sharding == sharding
    slot = opt.state(name).slots["exp_avg"]
    assert isinstance(slot, jax.Array) and slot.devices() <= p.devices()
    np.testing.assert_array_equal(p, w)
print("all stayed")
"""


def test_arrays_stay_on_their_devices() -> None:
    run = [sys.executable, "-W", "error", "-c", FOUR_DEVICES]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert result.stdout == "all stayed\n", result.stderr
