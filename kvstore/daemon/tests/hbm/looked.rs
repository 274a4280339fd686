//! A block under the glass while a device holds it.

use super::{HOST_ONLY, all_on, assert_no_leak};
use crate::common::lane::{Lane, store};
use crate::common::{Running, folder, keys, manifest, payload};
use terrace_client::wire::{
    LeaseKind, StatBlockRequest, StatBlockResponse, Tier, VerifiedCopy, VerifyBlockRequest,
};
use terrace_core::TenantKey;

async fn stat(daemon: &Running, id: &[u8]) -> StatBlockResponse {
    let mut admin = terrace_client::admin(&daemon.grpc).await.unwrap();
    admin.stat_block(StatBlockRequest { block_id: id.to_vec().into() }).await.unwrap().into_inner()
}

async fn verify(daemon: &Running, id: &[u8]) -> Vec<VerifiedCopy> {
    let mut admin = terrace_client::admin(&daemon.grpc).await.unwrap();
    let request = VerifyBlockRequest { block_id: id.to_vec().into() };
    admin.verify_block(request).await.unwrap().into_inner().copies
}

fn id_of(lane: &Lane, key: [u8; 4]) -> Vec<u8> {
    let tenant = TenantKey::from_bytes(lane.space.tenant_key.as_ref().try_into().unwrap());
    let space = manifest(0).space_id(terrace_core::tenant_id("default"));
    tenant.block_id(space, &key).to_bytes().to_vec()
}

/// A block that only a device holds could be shown as nowhere, without its leases, or as sound whatever lies there:
/// look at it, damage it through the writer's mapping, and look again; then with a copy in Nvme beside it.
#[tokio::test(flavor = "multi_thread")]
async fn copies_on_a_device_are_shown_and_compared() {
    let folder = folder();
    let daemon = Running::start(
        folder.path(),
        &format!("admission = \"all\"\npersist_delay_ms = 3600000\n{HOST_ONLY}"),
    );
    let names = keys(1);
    let mut writer = Lane::on_device(folder.path(), 0).await;
    let (window, written) = writer.write(&names).await;
    assert!(all_on(&written, 0));
    let mut reader = Lane::on_device(folder.path(), 0).await;
    let read = reader.lease(LeaseKind::Read, &names).await;
    let id = id_of(&reader, names[0]);
    let seen = stat(&daemon, &id).await;
    assert!(seen.present, "{seen:?}");
    let [copy] = &seen.copies[..] else { panic!("{seen:?}") };
    assert_eq!((copy.tier(), copy.device.as_str()), (Tier::Hbm, "host-only:0"));
    assert_eq!((copy.chunk, copy.frame), (read.blocks[0].chunk, read.blocks[0].frame));
    assert!(copy.verified && copy.pins >= 1 && seen.leases.contains(&read.lease), "{seen:?}");
    assert!(seen.explanation[0].contains("leased"), "{seen:?}");
    let grant = &written.blocks[0];
    let mut damaged = payload(names[0], 0);
    damaged[4097] ^= 1;
    for (bytes, sound) in [(payload(names[0], 0), true), (damaged, false), (payload(names[0], 0), true)] {
        store(&window, grant.offset, &bytes);
        let copies = verify(&daemon, &id).await;
        let [copy] = &copies[..] else { panic!("{copies:?}") };
        assert_eq!((copy.tier(), copy.ok), (Tier::Hbm, sound), "{copy:?}");
        assert_eq!(copy.found == copy.expected, sound, "{copy:?}");
    }
    reader.release(read.lease).await;
    writer.release(written.lease).await;
    let seen = stat(&daemon, &id).await;
    assert!(seen.leases.is_empty() && seen.explanation[0].contains("in Hbm alone"), "{seen:?}");
    daemon.persisted().await;
    let copies = verify(&daemon, &id).await;
    let tiers: Vec<_> = copies.iter().map(|copy| (copy.tier(), copy.ok)).collect();
    assert!(tiers.contains(&(Tier::Hbm, true)) && tiers.contains(&(Tier::Nvme, true)), "{tiers:?}");
    drop((window, writer, reader));
    assert_no_leak(&daemon).await;
}
