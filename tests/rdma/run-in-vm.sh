#!/usr/bin/env bash
# run-in-vm.sh COMMAND [ARG...]
#
# Runs COMMAND in a throw-away virtual machine that has RDMA: Debian's own kernel with soft-RoCE
# (rdma_rxe) under QEMU. The guest sees this machine's root file system, read-only with a layer in
# memory on top, so it runs the project's virtual environment in the same directory and what it
# writes is gone afterwards. It has no network but the RDMA device. Output streams through, and the
# exit code is COMMAND's. Needs neither root nor KVM.
#
# Variables:
#   RDMA_VM_LINK   one   one device rxe0, 192.0.2.1 (the default)
#                  two   rxe0 and rxe1, 192.0.2.10 and .11, at the two ends of one virtual cable
#   RDMA_VM_LIMIT  seconds until the machine is stopped, exit code 124 (900)
#   RDMA_VM_MEMORY MiB (4096)        RDMA_VM_CPUS  processors (2)
#   RDMA_VM_PASS   names of variables that COMMAND gets, with spaces between
#   RDMA_VM_CACHE  folder for kernel and initial file system (~/.cache/baton/rdma-vm)
#   RDMA_VM_LOG    file for the guest kernel's log, for when something does not work
#
# Exit code 125: the machine could not be made or died.
set -euo pipefail

self=$(basename "$0")
fail() { echo "$self: $*" >&2; exit 125; }
[ $# -gt 0 ] || fail "no command given"

link=${RDMA_VM_LINK:-one}
[ "$link" = one ] || [ "$link" = two ] || fail "RDMA_VM_LINK is $link, must be one or two"
cache=${RDMA_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/baton/rdma-vm}
PATH=$PATH:/usr/sbin:/sbin
for tool in qemu-system-x86_64 busybox rdma ip depmod modprobe python3 dpkg; do
  type -P "$tool" >/dev/null || fail "$tool is missing; make test-rdma installs what is needed"
done

# --- kernel and initial file system, made once ---------------------------------------------------

make_initial_files() { # FOLDER KERNEL_TREE RELEASE: a busybox that loads modules and mounts
  local folder=$1 tree=$2 release=$3 module number=10
  mkdir -p "$folder"/{bin,modules,proc,sys,dev,host,layer,root}
  cp "$(type -P busybox)" "$folder/bin/busybox"
  for module in virtio_pci 9pnet_virtio 9p overlay crc32_generic ib_uverbs rdma_rxe dummy veth; do
    modprobe -d "$tree" -S "$release" --show-depends "$module" || fail "the kernel lacks $module"
  done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r module; do
    cp "$module" "$folder/modules/$((number++))-$(basename "$module")"
  done
  cat > "$folder/init" <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
exec </dev/null >/dev/kmsg 2>&1
stop() { echo "rdma-vm: cannot $*"; $b poweroff -f; }
for module in /modules/*; do $b insmod "$module" || stop load "$module"; done
p9=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o ro,$p9,cache=loose host /host || stop mount the root
$b mount -t tmpfs -o size=75%,mode=755 layer /layer
$b mkdir /layer/changes /layer/work
$b mount -t overlay -o lowerdir=/host,upperdir=/layer/changes,workdir=/layer/work all /root ||
  stop lay the file systems over each other
$b mount -t proc proc /root/proc
$b mount -t sysfs sys /root/sys
$b mount -t devtmpfs dev /root/dev
$b mkdir -p /root/dev/pts /root/dev/shm
$b ln -sf /proc/self/fd /root/dev/fd
$b mount -t devpts pts /root/dev/pts
$b mount -t tmpfs -o mode=1777 shm /root/dev/shm
$b mount -t tmpfs -o mode=755 run /root/run
$b mkdir /root/run/rdma-vm
$b mount -t 9p -o $p9,cache=none orders /root/run/rdma-vm || stop mount the orders
# Serial lines as they come: no line ends rewritten, nothing echoed.
for line in /dev/ttyS0 /dev/ttyS1; do $b stty -F $line raw -echo; done
$b mkfifo /out /err
$b cat </out >/dev/ttyS0 & out=$!
$b cat </err >/dev/ttyS1 & err=$!
$b env -i $b chroot /root /bin/bash /run/rdma-vm/orders </dev/null >/out 2>/err
echo $? > /root/run/rdma-vm/code
# What the command left running would hold its output open.
for process in /proc/[0-9]*; do
  case ${process#/proc/} in 1|$out|$err) ;; *) $b kill -9 "${process#/proc/}" 2>/dev/null ;; esac
done
wait $out $err
$b poweroff -f
INIT
  chmod +x "$folder/init"
}

make_cache() {
  local work package release
  work=$(mktemp -d "$cache/making.XXXXXX")
  chmod 755 "$work"
  package=$(apt-cache depends linux-image-amd64 | awk '$1 == "Depends:" && !n++ { print $2 }')
  [ -n "$package" ] || fail "apt does not know linux-image-amd64; run apt-get update"
  (cd "$work" && apt-get -q download "$package" >/dev/null 2>&1) || fail "cannot download $package"
  dpkg -x "$work"/linux-image-*.deb "$work/tree"
  release=$(basename "$work"/tree/lib/modules/*)
  depmod -b "$work/tree" "$release"
  make_initial_files "$work/files" "$work/tree" "$release"
  (cd "$work/files" && busybox find . | busybox cpio -o -H newc 2>/dev/null) > "$work/initramfs"
  # Unpacked here, where it takes a second, and not under emulation.
  python3 - "$work/tree/boot/vmlinuz-$release" "$work/vmlinux" <<'PY'
import lzma, pathlib, sys
image = pathlib.Path(sys.argv[1]).read_bytes()
start = image.find(b"\xfd7zXZ\0")
kernel = lzma.LZMADecompressor().decompress(image[start:]) if start >= 0 else b""
if kernel[:4] != b"\x7fELF":
    sys.exit("no xz-packed kernel in it")
pathlib.Path(sys.argv[2]).write_bytes(kernel)
PY
  mkdir "$work/ready"
  mv "$work/vmlinux" "$work/initramfs" "$work/ready"
  rm -rf "$cache/ready"
  mv "$work/ready" "$cache/ready"
  rm -rf "$work"
}

mkdir -p "$cache"
# The files depend on this script, so a change of it makes them anew.
stamp=$(cksum < "$0")
(
  flock 9
  [ "$(cat "$cache/ready/stamp" 2>/dev/null)" = "$stamp" ] || { make_cache; echo "$stamp" > "$cache/ready/stamp"; }
) 9>"$cache/lock"

# --- what the guest is to do ---------------------------------------------------------------------

work=$(mktemp -d "${TMPDIR:-/tmp}/rdma-vm.XXXXXX")
machine=
readers=()
clean_up() {
  local code=$?
  [ -z "$machine" ] || kill "$machine" 2>/dev/null || true
  [ ${#readers[@]} = 0 ] || kill "${readers[@]}" 2>/dev/null || true
  [ -z "${RDMA_VM_LOG-}" ] || cp "$work/kernel.log" "$RDMA_VM_LOG" 2>/dev/null || true
  rm -rf "$work"
  exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir "$work/orders"
{
  printf 'export PATH=%q HOME=%q LANG=C.UTF-8 TERM=dumb RDMA_VM=%q\n' "$PATH" "${HOME:-/root}" "$link"
  for name in ${RDMA_VM_PASS-}; do
    [ -z "${!name+set}" ] || printf 'export %s=%q\n' "$name" "${!name}"
  done
  cat <<'GUEST'
ulimit -l unlimited
one_link() {
  ip link add cable0 type dummy
  ip addr add 192.0.2.1/24 dev cable0
  ip link set cable0 mtu 9000 up
  rdma link add rxe0 type rxe netdev cable0
}
two_links() {
  # Both ends are in one network namespace, because this kernel's rxe knows only the first one. So
  # what goes from one end's address to the other's must be made to take the cable: such rules come
  # before the table of local addresses.
  local end far
  ip link add cable0 type veth peer name cable1
  for end in 0 1; do
    sysctl -qw "net.ipv4.conf.cable$end.accept_local=1" "net.ipv4.conf.cable$end.arp_ignore=1"
    ip addr add "192.0.2.1$end/32" dev "cable$end"
    ip link set "cable$end" mtu 9000 up
  done
  for end in 0 1; do
    far=$((1 - end))
    ip neigh replace "192.0.2.1$far" dev "cable$end" nud permanent \
      lladdr "$(cat "/sys/class/net/cable$far/address")"
    ip route add "192.0.2.1$far/32" dev "cable$end" src "192.0.2.1$end" table "10$end"
    ip rule add pref "1$end" iif lo from "192.0.2.1$end" to "192.0.2.1$far" lookup "10$end"
    ip rule add pref "2$end" iif lo to "192.0.2.1$far" oif "cable$end" lookup "10$end"
  done
  ip rule add pref 30 lookup local
  ip rule del pref 0
  for end in 0 1; do rdma link add "rxe$end" type rxe netdev "cable$end"; done
}
(set -e; ip link set lo up; "${RDMA_VM}_link$([ "$RDMA_VM" = one ] || echo s)") ||
  { echo "rdma-vm: cannot make the RDMA devices" >&2; exit 125; }
GUEST
  printf 'cd %q || exit 125\nexec' "$PWD"
  printf ' %q' "$@"
  echo
} > "$work/orders/orders"

# --- run it --------------------------------------------------------------------------------------

mkfifo "$work/out" "$work/err"
cat "$work/out" & readers+=($!)
cat "$work/err" >&2 & readers+=($!)
# Without erms the guest's kernel copies by words; "rep movsb" is emulated byte by byte. Signals that
# kill are told by the kernel even where a handler could not say anything any more.
options="panic=-1 mitigations=off random.trust_cpu=on tsc=nowatchdog nowatchdog"
timeout "${RDMA_VM_LIMIT:-900}" qemu-system-x86_64 \
  -accel tcg,thread=multi,tb-size=512 -cpu max,-erms,-smap,-smep,-la57,-pku -M pc \
  -smp "${RDMA_VM_CPUS:-2}" -m "${RDMA_VM_MEMORY:-4096}" \
  -nodefaults -no-user-config -display none -nic none -no-reboot \
  -kernel "$cache/ready/vmlinux" -initrd "$cache/ready/initramfs" \
  -append "console=ttyS2 $options print-fatal-signals=1" \
  -chardev "file,id=out,path=$work/out" -serial chardev:out \
  -chardev "file,id=err,path=$work/err" -serial chardev:err \
  -chardev "file,id=log,path=$work/kernel.log" -serial chardev:log \
  -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap \
  -device virtio-9p-pci,fsdev=host,mount_tag=host \
  -fsdev "local,id=orders,path=$work/orders,security_model=none" \
  -device virtio-9p-pci,fsdev=orders,mount_tag=orders \
  </dev/null >"$work/qemu.log" 2>&1 &
machine=$!
code=0
wait "$machine" || code=$?
machine=
if [ "$code" = 124 ]; then
  echo "$self: stopped after ${RDMA_VM_LIMIT:-900} s" >&2
  exit 124
fi
if [ "$code" = 0 ]; then
  wait "${readers[@]}" || true
  readers=()
fi
if [ -s "$work/orders/code" ]; then
  code=$(cat "$work/orders/code")
  if [ "$code" -gt 128 ]; then
    echo "$self: the command died of signal $((code - 128)); the guest kernel's last lines:"
    tail -n 15 "$work/kernel.log"
  fi >&2
  exit "$code"
fi
{ tail -n 5 "$work/qemu.log"; tail -n 15 "$work/kernel.log"; } >&2
fail "the virtual machine died (QEMU's exit code $code)"
