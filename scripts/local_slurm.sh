#!/usr/bin/env bash
# A real SLURM on this machine, for tests and for trying `vit-suite launch`. Needs root and Debian's or Ubuntu's apt.
#
#   scripts/local_slurm.sh exec COMMAND...          starts the cluster, runs COMMAND in it, always stops it
#   scripts/local_slurm.sh start | stop             the same by hand, with  eval "$(scripts/local_slurm.sh env)"  between
#   scripts/local_slurm.sh install                  only the packages (the others install them too where they are missing)
#
# Jobs of partition `spot` are pre-empted by jobs of partition `local`. Everything is in LOCAL_SLURM_ROOT, nothing in /etc; only the
# daemons that were started from there are stopped. Knobs (environment, with defaults):
#   LOCAL_SLURM_ROOT  /tmp/local_slurm   keys, state, logs; `stop` deletes it
#   LOCAL_SLURM_PORT  26900              of the controller; node N has the N-th after it
#   LOCAL_SLURM_NODES 2   LOCAL_SLURM_CPUS 2   LOCAL_SLURM_GPUS 0     of each node; CPUs and GPUs are pretended
set -euo pipefail
root=${LOCAL_SLURM_ROOT:-/tmp/local_slurm}
port=${LOCAL_SLURM_PORT:-26900}
nodes=${LOCAL_SLURM_NODES:-2}
cpus=${LOCAL_SLURM_CPUS:-2}
gpus=${LOCAL_SLURM_GPUS:-0}
export PATH=$PATH:/usr/sbin SLURM_CONF=$root/slurm.conf

fail() { echo "local_slurm: $*" >&2; exit 1; }

install_packages() {
  [ "$(command -v slurmctld slurmd munged sbatch | wc -l)" != 4 ] || return 0
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || fail "SLURM is not installed, and installing it needs root and apt-get"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

# Nodes are addresses of the loopback device: a node list then resolves to where rank 0 listens, without names in /etc/hosts.
# cred_expire: SLURM holds a requeued job back until the old job's credential is void, two minutes by default.
# FirstJobId: the ranks of a job meet at a port that follows from its number, and there may be another cluster on this machine.
# KillWait: seconds from SIGTERM to SIGKILL. MinJobAge: seconds for which a job that has ended can be asked about.
# preempt_send_user_signal: a job that is pre-empted hears its --signal at once, and has GraceTime from then.
write_conf() {
  local host
  host=$(hostname -s)
  cat >"$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
FirstJobId=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$root/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$root/state
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdSpoolDir=$root/spool/%n
SlurmdPidFile=$root/run/slurmd-%n.pid
SlurmdLogFile=$root/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
KillWait=5
MinJobAge=86400
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
$([ "$gpus" = 0 ] || echo GresTypes=gpu)
END
  for n in $(seq "$nodes"); do
    echo "NodeName=127.0.0.$n NodeHostname=$host NodeAddr=127.0.0.$n Port=$((port + n)) CPUs=$cpus RealMemory=16000$(gres)" >>"$SLURM_CONF"
  done
  local all=Nodes=127.0.0.[1-$nodes]
  [ "$nodes" != 1 ] || all=Nodes=127.0.0.1
  echo "PartitionName=local $all Default=YES PriorityTier=2 PreemptMode=OFF" >>"$SLURM_CONF"
  echo "PartitionName=spot $all PriorityTier=1 PreemptMode=REQUEUE GraceTime=60" >>"$SLURM_CONF"
}

# Any character device passes for a GPU where no control group guards devices.
gres() {
  [ "$gpus" != 0 ] || return 0
  for n in $(seq 0 $((gpus - 1))); do ln -sfn /dev/null "$root/gpu$n"; done
  echo "Name=gpu File=$root/gpu[0-$((gpus - 1))]" >"$root/gres.conf"
  echo " Gres=gpu:$gpus"
}

running() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

# The daemons part from this shell and its files: who waits for its output to end must not wait for them.
start() {
  install_packages
  umask 022 # munge trusts no key in a folder that others may write to
  mkdir -p "$root"/{run,log,state,spool}
  (umask 077 && head -c 128 /dev/urandom >"$root/munge.key")
  write_conf
  munged --key-file="$root/munge.key" --socket="$root/run/munge.socket" --pid-file="$root/run/munged.pid" \
    --seed-file="$root/run/munge.seed" --log-file="$root/log/munged.log" </dev/null >>"$root/log/start.log" 2>&1
  slurmctld -c </dev/null >>"$root/log/start.log" 2>&1
  for n in $(seq "$nodes"); do
    mkdir -p "$root/spool/127.0.0.$n"
    slurmd -N "127.0.0.$n" </dev/null >>"$root/log/start.log" 2>&1
  done
  for _ in $(seq 150); do
    [ "$(sinfo -h -N -p local -t idle 2>/dev/null | wc -l)" != "$nodes" ] || return 0
    sleep 0.2
  done
  fail "the nodes did not come up within 30 s"
}

# Jobs first, or their processes would outlive the daemons.
stop() {
  [ -d "$root/run" ] || return 0
  if running "$root/run/slurmctld.pid"; then
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 75); do
      [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
      sleep 0.2
    done
  fi
  for file in "$root"/run/slurmd-*.pid "$root/run/slurmctld.pid" "$root/run/munged.pid"; do
    running "$file" || continue
    local pid
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
  done
  rm -rf "$root"
}

# Before any trap that would stop it.
refuse_second() { ! running "$root/run/slurmctld.pid" || fail "there is a cluster in $root already"; }

case ${1:-} in
  install) install_packages ;;
  start)
    refuse_second
    trap 'status=$?; [ $status = 0 ] || { tail -n 20 "$root"/log/*.log >&2 || true; stop; }' EXIT
    start
    ;;
  stop) stop ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  exec)
    shift
    refuse_second
    trap 'status=$?; [ -e "$root/ran" ] || tail -n 20 "$root"/log/*.log >&2 || true; stop; exit $status' EXIT
    trap 'exit 143' TERM
    trap 'exit 130' INT
    start
    touch "$root/ran"
    "$@"
    ;;
  *) fail "usage: $0 exec COMMAND... | start | stop | env | install" ;;
esac
