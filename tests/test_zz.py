import time, re
from tests.runs import *
def test_x(start, tmp_path):
    start(tmp_path, "name=z", "max_steps=1").succeeds()
    for over in ([], ["global_batch=64"], ["data.workers=2", "global_batch=64"]):
        t=time.time()
        r=start(tmp_path, f"name=a{time.time()}", "max_steps=33", "val_every=5", "checkpoint.every_steps=8", *over)
        seen=0
        while r.poll() is None:
            o=r.output.splitlines()
            for l in o[seen:]: print(f"{time.time()-t:.2f}", l[:60])
            seen=len(o); time.sleep(.02)
        print(time.time()-t)
