"""Stands in for the whole worker: speaks the protocol badly, in the way its argument names."""

import json
import os
import sys
import time

manner = sys.argv[1]


def say(**event):
    print(json.dumps(event), flush=True)


if manner == "broken":
    say(event="broken", message="ImportError: no torch")
    sys.exit(1)
if manner == "dies-early":
    print("libtorch.so: cannot open", file=sys.stderr)
    sys.exit(127)
print("a library says hello on stdout", flush=True)
say(event="ready", facts={"manner": manner})
for line in sys.stdin:
    job = json.loads(line)
    if manner == "dies":
        print("something terrible", file=sys.stderr, flush=True)
        os._exit(3)
    if manner == "silent":
        time.sleep(600)
    sys.stdout.write("}{ not json\n[1, 2]\n")
    say(event="started", id=job["id"], pid=os.getpid() if manner == "own-pid" else 2**22 + 1)
    say(event="exited", id=job["id"] + 1000, pid=1, code=0)
    if manner != "no-result":
        with open(job["result"], "w") as file:
            good = {"status": "ok", "status_detail": {}, "answer": {"metrics": {}, "observed": {}}}
            bad = {
                "unfinished": '{"status": "ok"',
                "other-keys": '{"a": 1}',
                "other-status": json.dumps(good | {"status": "fab"}),
            }
            file.write(bad.get(manner, json.dumps(good)))
    say(event="exited", id=job["id"], pid=2**22 + 1, code=0)
