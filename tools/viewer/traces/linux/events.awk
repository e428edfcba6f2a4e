# Makes the `events` lines that the viewer reads, out of ftrace's text of the events kmalloc, kfree, kmem_cache_alloc
# and kmem_cache_free. Blocks from before are left out. A block that comes again without having been freed was freed in
# bulk, which has no event, so it is freed just before.
function emit(kind, len) {
    if (count % 16 == 0) printf("%ssmp-heap v1 events cpu=0 time=%s dropped=0 list=", count ? "\n" : "", hex(now))
    passed = count % 16 ? now - last : 0
    printf("%s%s%s:%s:%x:3", count % 16 ? "," : "", kind, hex(passed), addr, len)
    last = now
    count++
}

# In halves, since some awks write no number of more than 32 bits.
function hex(number) {
    return number < 2 ^ 28 ? sprintf("%x", number) : sprintf("%x%07x", int(number / 2 ^ 28), number % 2 ^ 28)
}

function field(name) {
    return match($0, name "=[0-9a-f]+") ? substr($0, RSTART + length(name) + 1, RLENGTH - length(name) - 1) : ""
}

$5 !~ /^(kmalloc|kfree|kmem_cache_alloc|kmem_cache_free):$/ { next }
{
    addr = field("ptr")
    # No block, and a block of 0 bytes.
    if (addr ~ /^0*[01]0$/) next
    # The direct map is far shorter than 4 GiB here.
    addr = substr(addr, length(addr) - 7)
    sub(/^0+/, "", addr)
    now = int($4 * 1000000 + 0.5) * 1000
    if ($5 ~ /alloc:$/) {
        if (addr in live) emit("f", live[addr])
        live[addr] = field("bytes_req") + 0
        emit("a", live[addr])
    } else if (addr in live) {
        emit("f", live[addr])
        delete live[addr]
    }
}
END { print "" }
