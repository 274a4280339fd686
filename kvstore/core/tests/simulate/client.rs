//! Random clients: what each knows, asks, writes and believes.

use std::collections::BTreeMap;

use terrace_core::*;

use crate::node::{BLOCK_BYTES, GARBAGE, World, checksum_of};

/// A read that was granted, or the writer's own sealed block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadGrant {
    pub(crate) block: BlockId,
    pub(crate) frame: FrameRef,
    pub(crate) fence: u64,
    pub(crate) checksum: Checksum,
}

/// A frame that the client may fill.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WriteGrant {
    block: BlockId,
    frame: FrameRef,
    fence: u64,
    position: u32,
    /// Bytes it stored and the checksum that it says they have.
    stored: Option<(u64, Checksum)>,
}

#[derive(Debug)]
pub(crate) struct ClientLease {
    is_write: bool,
    generation: u64,
    reads: Vec<ReadGrant>,
    writes: Vec<WriteGrant>,
}

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) tenant: TenantId,
    pub(crate) locality: Locality,
    leases: BTreeMap<LeaseId, ClientLease>,
    pub(crate) sent: BTreeMap<RequestId, (Request, u64)>,
    /// Requests that were answered, to be sent again, with the answer.
    answered: Vec<(Request, Reply)>,
    expected: BTreeMap<RequestId, Reply>,
    repeat_last: u64,
}

impl Client {
    pub(crate) fn reads(&self) -> Vec<ReadGrant> {
        self.leases.values().flat_map(|lease| lease.reads.iter().copied()).collect()
    }

    /// Whether a reply grants nothing of a lease that this client does not hold any more.
    fn has_ended(&self, first: &Reply, reply: &Reply) -> bool {
        let Reply::Leased { lease: Some(lease), blocks: granted, .. } = first else { return false };
        let Reply::Leased { lease: None, blocks, .. } = reply else { return false };
        let nothing = |grant: &Grant| *grant == Grant::Missing(MissReason::Unknown);
        !self.leases.contains_key(lease) && blocks.len() == granted.len() && blocks.iter().all(nothing)
    }
}

impl World {
    fn open(&mut self) {
        if self.clients.len() >= 5 {
            return;
        }
        self.session_last += 1;
        let session = SessionId::new(self.session_last);
        let tenant = self.spaces[self.random.index(3)].tenant;
        let locality = match self.random.below(10) {
            0..=4 => Locality::Local,
            5 | 6 => Locality::Isolated,
            _ => Locality::Streamed,
        };
        let client = Client {
            tenant,
            locality,
            leases: BTreeMap::new(),
            sent: BTreeMap::new(),
            answered: Vec::new(),
            expected: BTreeMap::new(),
            repeat_last: 0,
        };
        self.clients.insert(session, client);
        self.tell(Input::SessionOpened { session, tenant, locality });
    }

    /// The client is gone, perhaps by kill -9: a child of it may go on writing.
    pub(crate) fn close(&mut self, session: SessionId) {
        let Some(client) = self.clients.remove(&session) else { return };
        if client.locality != Locality::Streamed {
            let writes = client.leases.values().flat_map(|lease| lease.writes.iter());
            for write in writes.filter(|write| write.stored.is_none()) {
                self.ghosts.push((write.frame, session, u32::MAX));
            }
        }
        self.tell(Input::SessionClosed { session });
    }

    pub(crate) fn send(&mut self, session: SessionId, op: Request) {
        self.request_last += 1;
        let request = RequestId::new(self.request_last);
        let generation = match &op {
            Request::LeaseWrite { space, .. } => self.generation(*space),
            _ => 0,
        };
        let Some(client) = self.clients.get_mut(&session) else { return };
        client.sent.insert(request, (op.clone(), generation));
        self.tell(Input::Request { session, request, op });
    }

    fn generation(&self, space: SpaceId) -> u64 {
        self.spaces.iter().find(|known| known.id == space).map_or(0, |known| known.generation)
    }

    fn some_session(&mut self) -> Option<SessionId> {
        let sessions: Vec<SessionId> = self.clients.keys().copied().collect();
        if sessions.is_empty() { None } else { Some(sessions[self.random.index(sessions.len())]) }
    }

    fn some_lease(&mut self, session: SessionId, is_write: bool) -> Option<LeaseId> {
        let leases: Vec<LeaseId> = self.clients[&session]
            .leases
            .iter()
            .filter(|(_, lease)| lease.is_write == is_write)
            .map(|(id, _)| *id)
            .collect();
        if leases.is_empty() { None } else { Some(leases[self.random.index(leases.len())]) }
    }

    /// A part of one chain: of a space of the client's tenant, mostly.
    fn some_blocks(&mut self, session: SessionId) -> (SpaceId, Vec<BlockId>, Option<BlockId>) {
        let tenant = self.clients[&session].tenant;
        let own: Vec<usize> = (0..3).filter(|&n| self.spaces[n].tenant == tenant).collect();
        let place =
            if self.random.percent(97) { own[self.random.index(own.len())] } else { self.random.index(3) };
        let space = &self.spaces[place];
        let (id, chains) = (space.id, space.chains.clone());
        let chain = &chains[self.random.index(3)];
        let start = if self.random.percent(60) { 0 } else { self.random.index(8) };
        let end = start + 1 + self.random.index(8 - start);
        let parent = (start > 0 && self.random.percent(80)).then(|| chain[start - 1]);
        let mut blocks = chain[start..end].to_vec();
        if self.random.percent(3) {
            // Nobody forbids to name a block twice.
            let twice = blocks[self.random.index(blocks.len())];
            blocks.insert(self.random.index(blocks.len() + 1), twice);
        }
        (id, blocks, parent)
    }

    fn repeat(&mut self, session: SessionId) -> Option<u64> {
        let client = self.clients.get_mut(&session).expect("it is open");
        client.repeat_last += 1;
        Some(client.repeat_last)
    }

    pub(crate) fn client_acts(&mut self) {
        let Some(session) = self.some_session() else { return self.open() };
        match self.random.below(100) {
            0..=2 => self.open(),
            3 => self.close(session),
            4..=21 => self.ask_write(session),
            22..=44 => self.ask_seal(session),
            45..=66 => self.ask_read(session),
            67..=76 => self.ask_release(session),
            77..=79 => self.ask_abort(session),
            80..=82 => self.ask_renew(session),
            83..=85 => self.ask_hint(session),
            86 => self.ask_shrink(session),
            87..=92 => self.hand_back(session),
            93..=95 => self.ask_again(session),
            96 => self.scribble(session),
            97 => self.send(session, Request::Flush),
            98 if self.random.percent(25) => self.ask_clear(session),
            _ => self.scribble(session),
        }
    }

    fn ask_write(&mut self, session: SessionId) {
        let (space, blocks, parent) = self.some_blocks(session);
        let repeat = self.repeat(session);
        let want = self.some_memory();
        self.send(session, Request::LeaseWrite { repeat, space, blocks, parent, ttl: None, want });
    }

    fn ask_read(&mut self, session: SessionId) {
        let (_, blocks, _) = self.some_blocks(session);
        let repeat = self.repeat(session);
        let answer_by = Now::from_micros(self.now + self.random.below(60_000));
        let purpose = if self.random.percent(50) { Purpose::Decode } else { Purpose::Prefill };
        let want = self.some_memory();
        self.send(session, Request::LeaseRead { repeat, blocks, ttl: None, answer_by, purpose, want });
    }

    /// Writes blocks of a lease and seals them: mostly the right bytes, now and
    /// then others, now and then bytes that do not fit the checksum.
    fn ask_seal(&mut self, session: SessionId) {
        let Some(id) = self.some_lease(session, true) else { return self.ask_write(session) };
        let lease = &self.clients[&session].leases[&id];
        let (writes, generation) = (lease.writes.clone(), lease.generation);
        let streamed = self.clients[&session].locality == Locality::Streamed;
        let mut parts = Vec::new();
        let mut stored = Vec::new();
        for write in writes {
            // What it sealed it writes no more, answered or not.
            if write.stored.is_some() || self.random.percent(30) {
                continue;
            }
            let right = generation * 100 + 1;
            let payload = if self.random.percent(3) { right + 1 } else { right };
            let checksum = checksum_of(write.block, payload);
            let damaged = !streamed && self.random.percent(2);
            let bytes = if damaged { GARBAGE } else { payload };
            self.store(write.frame, write.fence, bytes);
            self.damaged.remove(&write.frame);
            if damaged {
                self.damaged.insert(write.frame, session);
            }
            self.sealed.entry(write.block).or_default().insert(checksum.get());
            parts.push((write.position, ByteCount::new(BLOCK_BYTES), checksum));
            stored.push((write.position, bytes, checksum));
        }
        if parts.is_empty() {
            return;
        }
        let client = self.clients.get_mut(&session).expect("it is open");
        let lease = client.leases.get_mut(&id).expect("it is live");
        for (position, bytes, checksum) in stored {
            let write =
                lease.writes.iter_mut().find(|write| write.position == position).expect("it is there");
            write.stored = Some((bytes, checksum));
        }
        let durability = if self.random.percent(40) { Durability::Durable } else { Durability::Readable };
        let repeat = self.repeat(session);
        self.send(session, Request::Seal { repeat, lease: id, blocks: parts, durability });
    }

    /// A client stores bytes in a frame that it was granted. It does not look whether its chunk is still in use.
    fn store(&mut self, frame: FrameRef, fence: u64, payload: u64) {
        if let Some(chunk) = self.chunks.get_mut(&frame.chunk) {
            let cell = &mut chunk.frames[frame.index as usize];
            assert!(
                chunk.owner.is_some() || cell.fence == fence,
                "{frame:?} of the pool is taken from its writer"
            );
            cell.payload = payload;
        }
    }

    /// Half-written blocks look like garbage.
    fn scribble(&mut self, session: SessionId) {
        let Some(id) = self.some_lease(session, true) else { return };
        for write in self.clients[&session].leases[&id].writes.clone() {
            if write.stored.is_none() {
                self.store(write.frame, write.fence, GARBAGE);
            }
        }
    }

    fn ask_release(&mut self, session: SessionId) {
        let is_write = self.random.percent(40);
        let Some(id) = self.some_lease(session, is_write) else { return };
        if self.is_sealing(session, id) {
            return;
        }
        self.clients.get_mut(&session).expect("it is open").leases.remove(&id);
        self.send(session, Request::Release { leases: vec![id] });
    }

    fn is_sealing(&self, session: SessionId, id: LeaseId) -> bool {
        self.clients[&session]
            .sent
            .values()
            .any(|(op, _)| matches!(op, Request::Seal { lease, .. } if *lease == id))
    }

    fn ask_abort(&mut self, session: SessionId) {
        let Some(id) = self.some_lease(session, true) else { return };
        if self.is_sealing(session, id) {
            return;
        }
        let client = self.clients.get_mut(&session).expect("it is open");
        client.leases.get_mut(&id).expect("it is live").writes.clear();
        self.send(session, Request::Abort { lease: id, indexes: Vec::new() });
    }

    fn ask_renew(&mut self, session: SessionId) {
        let is_write = self.random.percent(50);
        if let Some(lease) = self.some_lease(session, is_write) {
            self.send(session, Request::Renew { lease, ttl: None });
        }
    }

    fn ask_hint(&mut self, session: SessionId) {
        let (_, blocks, _) = self.some_blocks(session);
        let op = match self.random.below(5) {
            0 => Request::Touch { reads: blocks.iter().map(|_| 2).collect(), blocks },
            1 => Request::Prefetch { blocks, want: self.some_memory() },
            2 => Request::Retain { blocks, ttl: Micros::from_millis(self.random.below(500)), priority: 1 },
            3 => Request::Match { blocks, mode: MatchMode::Prefix },
            _ => Request::Match { blocks, mode: MatchMode::Set },
        };
        self.send(session, op);
    }

    /// Hands a window back in which it fills nothing any more. Most see to it that no write of theirs comes later.
    fn hand_back(&mut self, session: SessionId) {
        let own = |chunk: &crate::node::Chunk| chunk.owner == Some(session);
        let windows: Vec<ChunkId> =
            self.chunks.iter().filter(|(_, chunk)| own(chunk)).map(|(id, _)| *id).collect();
        if windows.is_empty() {
            return;
        }
        let chunk = windows[self.random.index(windows.len())];
        let client = &self.clients[&session];
        let mut writes = client.leases.values().flat_map(|lease| lease.writes.iter());
        let asking = client.sent.values().any(|(op, _)| matches!(op, Request::LeaseWrite { .. }));
        if asking || writes.any(|write| write.frame.chunk == chunk) {
            return;
        }
        if !self.random.percent(30) {
            self.ghosts.retain(|(frame, owner, _)| frame.chunk != chunk || *owner != session);
        }
        self.send(session, Request::ReturnWindow { chunk });
    }

    fn ask_clear(&mut self, session: SessionId) {
        let (space, _, _) = self.some_blocks(session);
        let repeat = self.repeat(session);
        self.send(session, Request::Clear { repeat, space });
    }

    /// A message is sent twice: it gets the same answer, or none of what was leased if that has ended.
    fn ask_again(&mut self, session: SessionId) {
        let client = self.clients.get_mut(&session).expect("it is open");
        let Some((op, reply)) = client.answered.last().cloned() else { return };
        let (Request::LeaseRead { repeat: Some(repeat), .. }
        | Request::LeaseWrite { repeat: Some(repeat), .. }
        | Request::Seal { repeat: Some(repeat), .. }) = op
        else {
            return;
        };
        if repeat + 7 < client.repeat_last {
            // Forgotten by now.
            return;
        }
        self.request_last += 1;
        let request = RequestId::new(self.request_last);
        client.expected.insert(request, reply);
        self.seen.repeats += 1;
        self.tell(Input::Request { session, request, op });
    }

    pub(crate) fn replied(&mut self, session: SessionId, request: RequestId, reply: Reply) {
        let Some(client) = self.clients.get_mut(&session) else { return };
        if let Some(expected) = client.expected.remove(&request) {
            if reply != expected {
                assert!(
                    client.has_ended(&expected, &reply),
                    "{reply:?} to a repeat of what had {expected:?}"
                );
                self.seen.ended_repeats += 1;
            }
            return;
        }
        let (op, generation) = client.sent.remove(&request).expect("a request gets one answer");
        let remembered =
            matches!(op, Request::LeaseRead { .. } | Request::LeaseWrite { .. } | Request::Seal { .. });
        if remembered && !matches!(reply, Reply::Throttled(_) | Reply::Refused(_)) {
            client.answered = vec![(op.clone(), reply.clone())];
        }
        match (op, reply) {
            (Request::LeaseRead { blocks, .. }, Reply::Leased { lease: Some(lease), blocks: grants, .. }) => {
                self.granted_read(session, lease, &blocks, &grants);
            }
            (Request::LeaseWrite { .. }, Reply::Leased { lease: Some(lease), blocks: grants, .. }) => {
                self.granted_write(session, lease, generation, &grants);
            }
            (Request::Seal { lease, blocks, durability, .. }, Reply::Sealed { outcomes }) => {
                self.sealed_parts(session, lease, &blocks, durability, &outcomes);
            }
            (Request::Shrink { gpu, .. }, Reply::Shrunk { free }) => self.shrunk(gpu, free),
            (Request::Seal { .. }, Reply::Refused(Refusal::Cleared | Refusal::NotYourLease { .. })) => {}
            (Request::Clear { space, .. }, Reply::Cleared { generation, .. }) => {
                for known in self.spaces.iter_mut().filter(|known| known.id == space) {
                    known.generation = known.generation.max(generation);
                }
            }
            (_, _) => {}
        }
    }

    fn granted_read(&mut self, session: SessionId, lease: LeaseId, blocks: &[BlockId], grants: &[Grant]) {
        let tenant = self.clients[&session].tenant;
        let mut reads = Vec::new();
        for (wanted, grant) in blocks.iter().zip(grants) {
            let Grant::Granted { block, frame, fence, offset, checksum, memory, .. } = *grant else {
                continue;
            };
            self.granted_in(session, frame, memory);
            assert_eq!(block, *wanted, "a grant is of the block that was asked for");
            assert_eq!(offset, u64::from(frame.index) * 8192 + 4096, "a grant says where the payload is");
            assert_eq!(self.chunks[&frame.chunk].tenant, tenant, "a tenant reads its own chunks");
            let checksum = checksum.expect("a sealed block has a checksum");
            let published = self.sealed.get(&block).is_some_and(|known| known.contains(&checksum.get()));
            assert!(published, "{block} is served with a checksum that nobody sealed");
            reads.push(ReadGrant { block, frame, fence: fence.get(), checksum });
        }
        // Bytes that it damaged itself are its own affair until somebody else asks.
        reads.retain(|read| !self.is_own_damage(session, read));
        let lease_of = ClientLease { is_write: false, generation: 0, reads, writes: Vec::new() };
        self.clients.get_mut(&session).expect("it is open").leases.insert(lease, lease_of);
    }

    fn is_own_damage(&mut self, session: SessionId, read: &ReadGrant) -> bool {
        let sound = checksum_of(read.block, self.frame(read.frame).payload) == read.checksum;
        let own = self.damaged.get(&read.frame) == Some(&session);
        assert!(sound || own, "{} is served to session {session} damaged, and not by itself", read.block);
        !sound
    }

    fn granted_write(&mut self, session: SessionId, lease: LeaseId, generation: u64, grants: &[Grant]) {
        let local = self.clients[&session].locality != Locality::Streamed;
        let mut writes = Vec::new();
        for (position, grant) in grants.iter().enumerate() {
            let Grant::Granted { block, frame, fence, memory, .. } = *grant else { continue };
            self.granted_in(session, frame, memory);
            let owner = self.chunks[&frame.chunk].owner;
            assert_eq!(owner, local.then_some(session), "a local client writes in its own window only");
            let position = u32::try_from(position).expect("a position");
            writes.push(WriteGrant { block, frame, fence: fence.get(), position, stored: None });
        }
        let lease_of = ClientLease { is_write: true, generation, reads: Vec::new(), writes };
        self.clients.get_mut(&session).expect("it is open").leases.insert(lease, lease_of);
    }

    fn sealed_parts(
        &mut self,
        session: SessionId,
        id: LeaseId,
        parts: &[(u32, ByteCount, Checksum)],
        durability: Durability,
        outcomes: &[SealOutcome],
    ) {
        assert_eq!(parts.len(), outcomes.len(), "one outcome for each part");
        let client = self.clients.get_mut(&session).expect("it is open");
        let Some(lease) = client.leases.get_mut(&id) else { return };
        for ((position, _, checksum), outcome) in parts.iter().zip(outcomes) {
            let Some(place) = lease.writes.iter().position(|write| write.position == *position) else {
                continue;
            };
            let write = lease.writes.remove(place);
            let intact = write.stored.is_some_and(|(bytes, sum)| checksum_of(write.block, bytes) == sum);
            let published =
                matches!(outcome, SealOutcome::Sealed | SealOutcome::Already | SealOutcome::NotDurable);
            self.seen.conflicts += u64::from(*outcome == SealOutcome::Conflict);
            if *outcome == SealOutcome::Sealed && intact {
                let (block, frame, fence, checksum) = (write.block, write.frame, write.fence, *checksum);
                lease.reads.push(ReadGrant { block, frame, fence, checksum });
            }
            if durability == Durability::Durable && published && *outcome != SealOutcome::NotDurable {
                assert!(
                    self.committed.contains(&write.block),
                    "{} is said to be durable and never was",
                    write.block
                );
            }
            // It may have been evicted while the rest of the request was waited for.
            let there = self.events.get(&write.block).is_some_and(|tiers| tiers.nvme);
            if durability == Durability::Durable && published && *outcome != SealOutcome::NotDurable && there
            {
                self.durable.insert(write.block, ());
                self.seen.durable += 1;
            }
        }
    }

    pub(crate) fn notified(&mut self, session: SessionId, notice: Notice) {
        let steps = self.steps;
        let Some(client) = self.clients.get_mut(&session) else { return };
        match notice {
            Notice::LeaseRevoked { lease, .. } => {
                let Some(lost) = client.leases.remove(&lease) else { return };
                assert!(
                    client.locality != Locality::Streamed || !lost.is_write,
                    "a streamed write does not expire"
                );
                for write in lost.writes.into_iter().filter(|write| write.stored.is_none()) {
                    self.ghosts.push((write.frame, session, steps + 60));
                }
            }
            Notice::WindowOpened { .. } => self.seen.ahead += 1,
            Notice::WindowRecalled { .. } | Notice::ChunkDropped { .. } => {}
            Notice::SealRejected { .. } => self.seen.rejected += 1,
        }
    }
}
