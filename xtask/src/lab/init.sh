#!/bin/busybox sh
# The lab's first process: drivers, channels, the command, its status, power off.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
HOME=/root
export PATH HOME
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tracefs tracefs /sys/kernel/tracing
mount -t debugfs debugfs /sys/kernel/debug
ln -s /proc/self/fd /dev/fd
ip link set lo up
for module in /etc/lab/modules/*.ko; do
    insmod "$module" || echo "lab: cannot load $module"
done
. /etc/lab/settings

# The channels appear when the host has answered the driver.
until [ -e /dev/vport0p3 ] && [ -e /dev/vda ]; do usleep 10000; done
mount -t ext4 -o ro,noatime /dev/vda /share || echo "lab: cannot mount the shared files"
. /etc/lab/links

# Should the host die, this machine must not outlive its deadline for long.
(sleep "$LAB_TIMEOUT_S"; echo "lab: past its deadline"; poweroff -f) &

# A port can be open only once, so one descriptor serves both directions.
exec 3<>/dev/vport0p1
if [ -n "$LAB_INPUT" ]; then exec 4<&3; else exec 4</dev/null; fi
sh /etc/lab/command <&4 >&3 2>/dev/vport0p2 3>&- 4<&-
echo "exit $?" >/dev/vport0p3
poweroff -f
