#!/bin/sh
# First process of the tiny test image.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /dev/virtio-ports
mount -t devpts -o gid=5,mode=620,ptmxmode=0666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=0755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
ln -sf /proc/self/fd /dev/fd
ln -sf fd/0 /dev/stdin
ln -sf fd/1 /dev/stdout
ln -sf fd/2 /dev/stderr
while read -r module; do
    insmod "/lib/modules/$module" || echo "slurm-vm: module $module did not load"
done </lib/modules/order
for word in $(cat /proc/cmdline); do
    case $word in
    slurm_vm.hostname=*) hostname "${word#*=}" ;;
    # For tests of how a guest may end.
    slurm_vm.poweroff_after=*) (sleep "${word#*=}" && poweroff -f) & ;;
    slurm_vm.panic_after=*) (sleep "${word#*=}" && echo c >/proc/sysrq-trigger) & ;;
    esac
done
ifconfig lo 127.0.0.1 up
if [ -b /dev/vda ] && mount -t ext4 -o noatime /dev/vda /scratch; then
    chmod 1777 /scratch
fi

port=/dev/virtio-ports/org.slurm-vm.0
# No udev here: the names of the ports come from sysfs. They may take a moment to appear.
tries=0
while [ ! -e "$port" ] && [ "$tries" -lt 100 ]; do
    for name in /sys/class/virtio-ports/*/name; do
        [ -e "$name" ] || continue
        device=${name%/name}
        ln -sf "/dev/${device##*/}" "/dev/virtio-ports/$(cat "$name")"
    done
    [ -e "$port" ] || sleep 0.1
    tries=$((tries + 1))
done
[ -e "$port" ] || echo "slurm-vm: there is no port $port"
echo "slurm-vm: guest is up, $(cut -d' ' -f1 /proc/uptime) s after the kernel"

while :; do
    /usr/libexec/slurm-vm/slurm-vm-guest --port "$port"
    code=$?
    [ "$code" = 0 ] && break
    echo "slurm-vm: helper ended with $code, started again"
    sleep 1
done
echo "slurm-vm: helper is done, power off"
sync
poweroff -f
