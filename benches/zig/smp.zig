//! `std.heap.smp_allocator` behind the three calls of a column.

const std = @import("std");
const Alignment = std.mem.Alignment;

fn allocator() std.mem.Allocator {
    return std.heap.smp_allocator;
}

export fn zig_alloc(size: usize, alignment: usize) ?[*]u8 {
    return allocator().rawAlloc(size, .fromByteUnits(alignment), @returnAddress());
}

export fn zig_free(start: [*]u8, size: usize, alignment: usize) void {
    allocator().rawFree(start[0..size], .fromByteUnits(alignment), @returnAddress());
}

export fn zig_realloc(start: [*]u8, size: usize, alignment: usize, new_size: usize) ?[*]u8 {
    const old = start[0..size];
    const log: Alignment = .fromByteUnits(alignment);
    if (allocator().rawRemap(old, log, new_size, @returnAddress())) |moved| return moved;
    const block = allocator().rawAlloc(new_size, log, @returnAddress()) orelse return null;
    const count = @min(size, new_size);
    @memcpy(block[0..count], old[0..count]);
    allocator().rawFree(old, log, @returnAddress());
    return block;
}
