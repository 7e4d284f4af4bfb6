//! Descriptor chains of a split virtqueue (virtio 1.2, clause 2.7), as a hostile driver may write them.
//!
//! virtio-queue's own iterator ends a malformed chain early, which makes it look like a shorter
//! well-formed one; a request must rather fail. It also starts only from the available ring, and a head
//! that is resubmitted after a crash does not come from there.

use vm_memory::{Bytes, GuestAddress};

use super::memory::{Memory, Span};

const DESCRIPTOR_BYTES: u64 = 16;

const NEXT: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT as u16;

/// The most descriptors of one chain: data in as many pieces as one system call takes, less header and
/// status.
pub(crate) const DESCRIPTORS_MAX: usize = 1024;

/// A chain with its pieces in order, the readable ones first as the standard demands.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) readable: Vec<Span>,
    pub(crate) writable: Vec<Span>,
}

/// How a chain breaks the standard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    #[error("a descriptor index is beyond the table")]
    Index,
    #[error("a descriptor table is not guest memory")]
    Table,
    #[error("the chain is longer than its table")]
    Loop,
    #[error("the chain has too many descriptors")]
    TooMany,
    #[error("an indirect descriptor is malformed or was not negotiated")]
    Indirect,
    #[error("a readable descriptor follows a writable one")]
    Order,
    #[error("the chain has more than 2^32 bytes")]
    TooLong,
}

struct Descriptor {
    span: Span,
    flags: u16,
    next: u16,
}

fn read(memory: &Memory, table: u64, index: u32) -> Result<Descriptor, ChainError> {
    let address = table
        .checked_add(u64::from(index) * DESCRIPTOR_BYTES)
        .ok_or(ChainError::Table)?;
    let mut bytes = [0; DESCRIPTOR_BYTES as usize];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .map_err(|_| ChainError::Table)?;
    let [a @ .., l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
    Ok(Descriptor {
        span: Span {
            address: GuestAddress(u64::from_le_bytes(a)),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
        },
        flags: u16::from_le_bytes([f0, f1]),
        next: u16::from_le_bytes([n0, n1]),
    })
}

/// Reads the chain that starts at `head` of the table with `size` entries at `table`.
pub(crate) fn walk(
    memory: &Memory,
    table: GuestAddress,
    size: u16,
    head: u16,
    indirect_allowed: bool,
) -> Result<Chain, ChainError> {
    let (mut table, mut size, mut index) = (table.0, u32::from(size), u32::from(head));
    let mut chain = Chain::default();
    let (mut total, mut steps, mut inside_indirect) = (0u64, 0u32, false);
    loop {
        if index >= size {
            return Err(ChainError::Index);
        }
        let descriptor = read(memory, table, index)?;
        if descriptor.flags & INDIRECT != 0 {
            let len = u64::from(descriptor.span.len);
            let whole = len != 0 && len % DESCRIPTOR_BYTES == 0;
            if !whole || inside_indirect || !indirect_allowed || descriptor.flags & NEXT != 0 {
                return Err(ChainError::Indirect);
            }
            // Less than 2^28, as the length is a u32.
            (table, size) = (descriptor.span.address.0, (len / DESCRIPTOR_BYTES) as u32);
            (index, steps, inside_indirect) = (0, 0, true);
            continue;
        }
        total += u64::from(descriptor.span.len);
        if total > 1 << 32 {
            return Err(ChainError::TooLong);
        }
        chain.add(descriptor.span, descriptor.flags & WRITE != 0)?;
        if descriptor.flags & NEXT == 0 {
            return Ok(chain);
        }
        steps += 1;
        if steps >= size {
            return Err(ChainError::Loop);
        }
        index = u32::from(descriptor.next);
    }
}

impl Chain {
    fn add(&mut self, span: Span, writable: bool) -> Result<(), ChainError> {
        if self.readable.len() + self.writable.len() == DESCRIPTORS_MAX {
            return Err(ChainError::TooMany);
        }
        match (writable, self.writable.is_empty()) {
            (true, _) => self.writable.push(span),
            (false, true) => self.readable.push(span),
            (false, false) => return Err(ChainError::Order),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::testing::memory;

    const TABLE: u64 = 0x1000;
    const INDIRECT_TABLE: u64 = 0x2000;

    type Row = (u64, u32, u16, u16);

    fn put(memory: &Memory, table: u64, rows: &[Row]) {
        for (index, (address, len, flags, next)) in rows.iter().enumerate() {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            let address = GuestAddress(table + index as u64 * DESCRIPTOR_BYTES);
            memory.write_slice(&bytes, address).unwrap();
        }
    }

    fn check(direct: &[Row], indirect: &[Row], expected: Result<(usize, usize), ChainError>) {
        let memory = memory(0x10000);
        put(&memory, TABLE, direct);
        put(&memory, INDIRECT_TABLE, indirect);
        let result = walk(&memory, GuestAddress(TABLE), 4, 0, true);
        let counts = result.map(|chain| (chain.readable.len(), chain.writable.len()));
        assert_eq!(counts, expected, "{direct:?} {indirect:?}");
    }

    #[test]
    fn a_well_formed_chain_is_read_in_order() {
        check(&[(0, 16, NEXT, 1), (64, 9, WRITE, 0)], &[], Ok((1, 1)));
        let table = (INDIRECT_TABLE, 48, INDIRECT, 0);
        let inside = [(0, 1, NEXT, 2), (0, 1, WRITE, 0), (0, 1, NEXT, 1)];
        check(&[table], &inside, Ok((2, 1)));
        check(&[(0, 1, NEXT, 1), table], &inside, Ok((3, 1)));
    }

    #[test]
    fn a_malformed_chain_is_refused() {
        for (direct, error) in [
            (&[(0, 1, NEXT, 4)][..], ChainError::Index),
            (&[(0, 1, NEXT, 0)], ChainError::Loop),
            (&[(0, 1, NEXT | WRITE, 1), (0, 1, 0, 0)], ChainError::Order),
            (&[(0, u32::MAX, NEXT, 1), (0, 2, 0, 0)], ChainError::TooLong),
            (&[(INDIRECT_TABLE, 0, INDIRECT, 0)], ChainError::Indirect),
            (&[(INDIRECT_TABLE, 15, INDIRECT, 0)], ChainError::Indirect),
            (
                &[(INDIRECT_TABLE, 16, INDIRECT | NEXT, 1)],
                ChainError::Indirect,
            ),
            (&[(0xffff_0000, 16, INDIRECT, 0)], ChainError::Table),
            (&[(u64::MAX - 3, 16, INDIRECT, 0)], ChainError::Table),
        ] {
            check(direct, &[], Err(error));
        }
        let table = (INDIRECT_TABLE, 32, INDIRECT, 0);
        check(
            &[table],
            &[(INDIRECT_TABLE, 16, INDIRECT, 0)],
            Err(ChainError::Indirect),
        );
        check(&[table], &[(0, 1, NEXT, 2)], Err(ChainError::Index));
        check(&[table], &[(0, 1, NEXT, 0)], Err(ChainError::Loop));
    }

    #[test]
    fn a_long_chain_is_refused_before_it_costs_memory() {
        let memory = memory(0x20000);
        let table = (INDIRECT_TABLE, 16 * 4096, INDIRECT, 0);
        put(&memory, TABLE, &[table]);
        let rows: Vec<Row> = (0..4096).map(|i| (0, 1, NEXT, i + 1)).collect();
        put(&memory, INDIRECT_TABLE, &rows);
        let result = walk(&memory, GuestAddress(TABLE), 4, 0, true);
        assert_eq!(result, Err(ChainError::TooMany));
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        let memory = memory(0x10000);
        put(&memory, TABLE, &[(INDIRECT_TABLE, 16, INDIRECT, 0)]);
        let result = walk(&memory, GuestAddress(TABLE), 4, 0, false);
        assert_eq!(result, Err(ChainError::Indirect));
    }
}
