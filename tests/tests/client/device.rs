//! Leases in device memory from the real daemon; host memory stands in for the device, on both sides by name.

use std::sync::Arc;
use std::time::Duration;

use terrace_client::wire::Tier;
use terrace_client::{
    ClientError, Durability, Leased, Outcome, ReadOptions, Reserved, SealOutcome, Session, Space,
    WriteOptions,
};
use terrace_core::ByteCount;
use terrace_gpudirect::{Device, HostOnly};

use crate::daemon::{BLOCK_BYTES, Daemon, keys, payload, until};

const HBM: &str = "[[hbm]]\ndevice = \"host-only\"\nbytes = \"16MiB\"";

fn own() -> Arc<dyn Device> {
    Arc::new(HostOnly::new(0, ByteCount::new(0)).unwrap())
}

fn wait() -> ReadOptions {
    ReadOptions { wait: Duration::from_secs(20), ..ReadOptions::default() }
}

/// Computes blocks on the device, and seals them there.
async fn fill(session: &Session, space: &Space, number: u32, count: usize) {
    let options = WriteOptions { wait: Duration::from_secs(20), ..WriteOptions::default() };
    let mut lease = session.lease_write_on(number, space, &keys(0, count), None, options).await.unwrap();
    for (seed, grant) in lease.grants.iter_mut().enumerate() {
        let Outcome::Granted(Reserved::Device(block)) = grant else { panic!("block {seed}: {grant:?}") };
        block.write(&payload(seed, BLOCK_BYTES)).unwrap();
        assert!(block.is_valid());
    }
    let all: Vec<u32> = (0..).take(count).collect();
    let outcomes = lease.seal(&all, Durability::Readable).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{outcomes:?}");
}

/// Bytes that the daemon copied to and from the device, and chunks that live there.
async fn activity(daemon: &Daemon) -> (u64, u64) {
    let tiers = daemon.info().await.tiers;
    let hbm = tiers.into_iter().find(|tier| tier.tier() == Tier::Hbm).unwrap();
    let activity = hbm.activity.unwrap();
    (activity.copied_bytes_total, activity.device_chunks)
}

// What one session computed on a device must be what another reads there, with no byte moved; and what a third reads in
// host memory. A lease that leaks would keep the frames.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sealed_on_a_device_is_read_there() {
    let daemon = Daemon::start(HBM);
    let (writer, space) = daemon.open().await;
    assert_eq!(writer.devices().len(), 1);
    assert_eq!(writer.devices()[0].kind, "host-only");
    let number = writer.add_device(own()).unwrap();
    fill(&writer, &space, number, 10).await;
    let (moved, _) = activity(&daemon).await;

    let (reader, space) = daemon.open().await;
    let device = own();
    reader.add_device(Arc::clone(&device)).unwrap();
    for _ in 0..3 {
        let lease = reader.lease_read_on(number, &space, &keys(0, 10), wait()).await.unwrap();
        assert_eq!(lease.prefix(), 10, "{:?}", lease.grants);
        let mut found = vec![0; BLOCK_BYTES];
        for (seed, grant) in lease.grants.iter().enumerate() {
            let block = grant.granted().and_then(Leased::on_device).expect("it lies on the device");
            block.read_verified(&mut found).unwrap();
            assert!(found == payload(seed, BLOCK_BYTES), "block {seed}");
        }
        assert!(lease.is_valid());
        lease.release().await.unwrap();
    }
    assert_eq!(device.room().unwrap().imports, 1, "one mapping for all leases of a chunk");
    assert_eq!(activity(&daemon).await.0, moved, "a lease moves nothing");

    let lease = reader.lease_read(&space, &keys(0, 10), wait()).await.unwrap();
    assert_eq!(lease.prefix(), 10, "{:?}", lease.grants);
    for (seed, grant) in lease.grants.iter().enumerate() {
        let mut found = vec![0; BLOCK_BYTES];
        grant.granted().unwrap().read_verified(&mut found).unwrap();
        assert!(found == payload(seed, BLOCK_BYTES), "block {seed} in host memory");
    }
    drop(lease);
    daemon.wait_quiet().await;
}

// What was written to host memory must come to the device when it is wanted there, with the same bytes.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_come_to_a_device() {
    let daemon = Daemon::start(HBM);
    let (session, space) = daemon.open().await;
    let keys = keys(0, 4);
    let payloads: Vec<Vec<u8>> = (0..4).map(|seed| payload(seed, BLOCK_BYTES)).collect();
    session.write(&space, &keys, None, &payloads, Durability::Readable).await.unwrap();
    session.flush_windows().await.unwrap();
    let number = session.add_device(own()).unwrap();
    let there = async || {
        let lease = session.lease_read_on(number, &space, &keys, wait()).await.unwrap();
        let mut found = vec![0; BLOCK_BYTES];
        let mut on_device = 0;
        for (seed, grant) in lease.grants.iter().enumerate() {
            if let Some(Leased::Device(block)) = grant.granted() {
                block.read_verified(&mut found).unwrap();
                assert!(found == payloads[seed], "block {seed}");
                on_device += 1;
            }
        }
        on_device == 4
    };
    until("all blocks on the device", there).await;
    daemon.wait_quiet().await;
}

// The worker beside a daemon that dies must live on: its mapping stays, and says that it is stale. Afterwards another
// daemon serves, and the old mapping goes with its last guard.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_leaves_mappings_and_no_valid_block() {
    let mut daemon = Daemon::start(HBM);
    let (session, space) = daemon.open().await;
    let device = own();
    let number = session.add_device(Arc::clone(&device)).unwrap();
    fill(&session, &space, number, 2).await;
    let lease = session.lease_read_on(number, &space, &keys(0, 2), wait()).await.unwrap();
    let block = lease.grants[1].granted().and_then(Leased::on_device).cloned().unwrap();
    let mut found = vec![0; BLOCK_BYTES];
    block.read_verified(&mut found).unwrap();
    daemon.kill();
    session.closed().await;
    assert!(!block.is_valid());
    assert!(matches!(block.read_verified(&mut found), Err(ClientError::Block(_))), "stale, and no fault");
    assert!(found == payload(1, BLOCK_BYTES), "the memory is there as long as it is mapped");
    drop((lease, block, session));
    until("the mapping goes", async || device.room().unwrap().imports == 0).await;
    daemon.restart();
    let (session, space) = daemon.open().await;
    let number = session.add_device(own()).unwrap();
    fill(&session, &space, number, 2).await;
}

// An engine that needs the device must get its memory back, and leases go on in host memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_shrinks_for_its_engine() {
    let daemon = Daemon::start(HBM);
    let (session, space) = daemon.open().await;
    let number = session.add_device(own()).unwrap();
    fill(&session, &space, number, 2).await;
    session.flush_windows().await.unwrap();
    let all = ByteCount::new(16 << 20);
    let free = session.shrink(number, all, Duration::from_secs(20)).await.unwrap();
    assert_eq!(free, all, "everything that was asked for");
    let lease = session.lease_read_on(number, &space, &keys(0, 2), wait()).await.unwrap();
    let in_host_memory = |grant: &Outcome<Leased>| matches!(grant, Outcome::Granted(Leased::Host(_)));
    assert!(lease.grants.iter().all(in_host_memory), "{:?}", lease.grants);
    drop(lease);
    assert_eq!(session.shrink(number, ByteCount::new(0), wait().wait).await.unwrap(), ByteCount::new(0));
}
