-- Gives a task that came in by a plain XADD the identity, queue and time it asked for.
-- ARGV: held id, owner, wanted id ('' keeps the held one), digest, queue, delay_ms,
--   not_before_ms, expires_ms, key.
-- Returns {verdict, id}: held (go on under id); moved (it waits elsewhere now); known (the
--   same task stands already, this one is dropped and its id points there); conflict,
--   unknown_queue (nothing changed); lost. A repeated call answers the same again.

local held, owner, wanted, digest, queue = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local delay, not_before, expires, key = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8], ARGV[9]

local r = fields_of(held, 'owner', 'queue', 'accepted', 'cancel')

-- What this very call answered before, if its reply was lost.
local function repeated()
  local id = wanted ~= '' and wanted or held
  local before = fields_of(id, 'owner', 'settled')
  local alias = fields_of(held, 'alias')[1]
  if alias ~= '' then
    return { 'known', alias }
  elseif before[1] == owner then
    return { 'held', id }
  elseif before[2] == owner then
    return { 'moved', id }
  end
  return { 'lost', held }
end

if r[1] ~= owner then
  return repeated()
end

local function merge_into(id)
  redis.call('ZREM', LEASES, held)
  redis.call('ZREM', OPEN, held)
  redis.call('DEL', record_key(held))
  redis.call('HSET', record_key(held), 'alias', id)
  redis.call('PEXPIRE', record_key(held), int(limits().retention))
  return { 'known', id }
end

local function standing(id)
  if id == held or redis.call('EXISTS', record_key(id)) == 0 then
    return nil
  end
  if redis.call('HGET', record_key(id), 'digest') == digest then
    return merge_into(id)
  end
  return { 'conflict', id }
end

local holder = key ~= '' and redis.call('GET', BASE .. 'key:' .. key)
local verdict = holder and standing(holder) or wanted ~= '' and standing(wanted)
if verdict then
  return verdict
end
if not registered(queue) or not is_usable(queue) then
  return { 'unknown_queue', held }
end

local id = held
if wanted ~= '' and wanted ~= held then
  id = wanted
  redis.call('RENAME', record_key(held), record_key(id))
  redis.call('ZADD', LEASES, redis.call('ZSCORE', LEASES, held), id)
  redis.call('ZREM', LEASES, held)
  redis.call('ZADD', OPEN, r[3], id)
  redis.call('ZREM', OPEN, held)
  local instance = string.match(owner, '^(.*)/[^/]*/[^/]*$')
  if redis.call('HGET', SUSPECTS, instance) == held then
    redis.call('HSET', SUSPECTS, instance, id)
  end
end
redis.call('HSET', record_key(id), 'digest', digest, 'queue', queue, 'key', key, 'expires', expires)
if key ~= '' then
  redis.call('SET', BASE .. 'key:' .. key, id)
end

local due = math.max(not_before, tonumber(r[3]) + delay)
local is_later = due > now_ms()
if not is_later and queue == r[2] then
  return { 'held', id }
end
disown(id, owner)
if r[4] ~= '' then
  close(id, { state = 'cancelled', message = 'cancelled before it started' })
else
  watch_expiry(id)
  if is_later then
    schedule(id, due)
  else
    append(id, queue)
  end
end
return { 'moved', id }
