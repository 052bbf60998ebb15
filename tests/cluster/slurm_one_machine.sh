#!/usr/bin/env bash
# A Slurm of this machine alone, as root: `start DIR` installs Debian's packages where they are missing and prints the
# path of its configuration, `stop DIR` ends it. No systemd, no cgroups, no accounting; a job that is requeued dies
# within KillWait seconds.
set -euo pipefail
what=${1:?start or stop} dir=$(realpath "${2:?a folder for its state and logs}")
conf=$dir/slurm.conf

finish() { # PID_FILE: ends the daemon that wrote it, and waits until it has gone
  [ -s "$1" ] || return 0
  local pid; pid=$(cat "$1")
  kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
  kill -9 "$pid" 2>/dev/null || true
}

if [ "$what" = stop ]; then
  export SLURM_CONF=$conf
  timeout 30 scancel --user="$(id -un)" >/dev/null 2>&1 || true
  for _ in $(seq 30); do [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ] || break; sleep 1; done
  for name in slurmctld slurmd munged; do finish "$dir/$name.pid"; done
  for pid in $(pgrep -x slurmstepd); do  # of a job that had not quite ended: it works in the folder of its daemon
    [ "$(readlink "/proc/$pid/cwd")" != "$dir" ] || kill -9 "$pid" 2>/dev/null || true
  done
  exit 0
fi

if ! command -v sbatch >/dev/null || [ ! -x /usr/sbin/munged ]; then
  export DEBIAN_FRONTEND=noninteractive
  # packages must not start daemons of their own
  policy=/usr/sbin/policy-rc.d; [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; made=$policy; }
  apt-get update -qq >&2
  apt-get install -y -qq --no-install-recommends slurm-wlm munge >&2
  [ -z "${made:-}" ] || rm -f "$made"
fi

mkdir -p "$dir/state" "$dir/spool" /run/munge /var/log/munge /var/lib/munge /etc/munge
[ -s /etc/munge/munge.key ] || head -c 1024 /dev/urandom >/etc/munge/munge.key
chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge
chmod 400 /etc/munge/munge.key; chmod 755 /run/munge
if ! munge -n >/dev/null 2>&1; then
  rm -f "$dir/munged.pid"; touch "$dir/munged.pid"; chown munge: "$dir/munged.pid"
  runuser -u munge -- /usr/sbin/munged --force
  cat /run/munge/munged.pid >"$dir/munged.pid"  # ours to end
fi

host=$(hostname -s)
cat >"$conf" <<C
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURM_TEST_PORT:-16817}
SlurmdPort=$((${SLURM_TEST_PORT:-16817} + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=8
SchedulerParameters=sched_interval=5,batch_sched_delay=0
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
C
export SLURM_CONF=$conf
/usr/sbin/slurmctld -f "$conf" >&2
/usr/sbin/slurmd -f "$conf" >&2
for _ in $(seq 60); do
  if sinfo --noheader --format=%t 2>/dev/null | grep -q idle; then echo "$conf"; exit 0; fi
  sleep 1
done
echo "Slurm did not come up:" >&2
tail -n 20 "$dir"/*.log >&2
exit 1
