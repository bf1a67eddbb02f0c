-- What any instance does for all, about once a second: joins (group, queues, heartbeat),
-- promotes what is due, takes over what lapsed, forgets instances that are gone.
-- ARGV: instance, incarnation, info ('' leaves), lease_ms, group, namespace to use if there is
--   none, limit, forget_ms, retention_ms, results_length, max_length, max_bytes, then the queues
--   this instance serves.
-- Returns {namespace, now, promoted, taken_over, next_due ('' if none), rival}; with rival 1 a
--   living instance has the same name, and nothing was done.

local instance, incarnation, info, lease, group = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local limit, forget = tonumber(ARGV[7]), tonumber(ARGV[8])
local FIRST_QUEUE = 13
local INSTANCES = BASE .. 'meta:instances'
local INCARNATIONS = BASE .. 'meta:incarnations'
local SEEN = BASE .. 'meta:seen'
local now = now_ms()

local function ensure_group(queue)
  local reply = redis.pcall('XGROUP', 'CREATE', stream_of(queue), group, '0', 'MKSTREAM')
  if reply.err and not string.find(reply.err, 'BUSYGROUP', 1, true) then
    error(reply.err)
  end
end

-- A consumer is deleted only when nothing is pending on it: what is could never be reached again.
local function forget_instance(name)
  for _, queue in ipairs(redis.call('SMEMBERS', QUEUES)) do
    local pending = redis.pcall('XPENDING', stream_of(queue), group, '-', '+', 1, name)
    if not pending.err and #pending == 0 then
      redis.call('XGROUP', 'DELCONSUMER', stream_of(queue), group, name)
    end
  end
  redis.call('HDEL', INSTANCES, name)
  redis.call('HDEL', INCARNATIONS, name)
  redis.call('ZREM', SEEN, name)
  redis.call('DEL', BASE .. 'control:' .. name)
end

-- Whether time has run on without a gap. After a gap (a paused Redis, a jumped clock) nobody
-- had the chance to renew, so nothing is taken over until everybody has had it.
local function continuous()
  local last = tonumber(redis.call('HGET', META, 'last_tick') or now)
  redis.call('HSET', META, 'last_tick', int(now))
  if now < last then
    for _, id in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do
      redis.call('ZADD', LEASES, int(now + lease), id)
    end
    redis.call('HSET', META, 'calm_until', int(now + lease))
  elseif now - last > lease / 2 then
    redis.call('HSET', META, 'calm_until', int(now + lease))
  end
  local calm_until = tonumber(redis.call('HGET', META, 'calm_until') or 0)
  return now >= calm_until or calm_until > now + lease
end

local function promote(queue)
  local due = redis.call('ZRANGEBYSCORE', due_of(queue), '-inf', int(now), 'LIMIT', 0, limit)
  for _, id in ipairs(due) do
    redis.call('ZREM', due_of(queue), id)
    if fields_of(id, 'state')[1] == 'scheduled' then
      put_back(id)
    end
  end
  return #due
end

local function take_over()
  local lapsed = redis.call('ZRANGEBYSCORE', LEASES, '-inf', int(now), 'LIMIT', 0, limit)
  for _, id in ipairs(lapsed) do
    local owner = fields_of(id, 'owner')[1]
    if owner ~= '' then
      disown(id, '')
      redis.call('HINCRBY', record_key(id), 'takeovers', 1)
      put_back(id)
    else
      redis.call('ZREM', LEASES, id) -- somebody deleted its record
    end
  end
  return #lapsed
end

-- Two of one name would read each other's messages and speak for each other's tasks.
local function rival()
  local other = redis.call('HGET', INCARNATIONS, instance)
  local seen = tonumber(redis.call('ZSCORE', SEEN, instance) or 0)
  -- Seen in the future is no sign of life either: the clock has been set back since.
  return other and other ~= incarnation and math.abs(now - seen) < lease
end

go_on_without_memory()
redis.call('HSETNX', META, 'namespace', ARGV[6])
if rival() then
  return { redis.call('HGET', META, 'namespace'), now, 0, 0, '', 1 }
elseif info == '' then
  forget_instance(instance)
else
  for i = FIRST_QUEUE, #ARGV do
    redis.call('SADD', QUEUES, ARGV[i])
    ensure_group(ARGV[i])
  end
  redis.call('HSET', META, 'retention', ARGV[9], 'results_length', ARGV[10], 'max_length', ARGV[11],
    'max_bytes', ARGV[12])
  redis.call('HSET', INSTANCES, instance, info)
  redis.call('HSET', INCARNATIONS, instance, incarnation)
  redis.call('ZADD', SEEN, int(now), instance)
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', SEEN, '-inf', int(now - forget), 'LIMIT', 0, limit)) do
  forget_instance(name)
end
local taken_over = continuous() and take_over() or 0
local promoted, next_due = 0, ''
for _, queue in ipairs(all_queues()) do
  promoted = promoted + promote(queue)
  local first = tonumber(redis.call('ZRANGE', due_of(queue), 0, 0, 'WITHSCORES')[2])
  if first and (next_due == '' or first < tonumber(next_due)) then
    next_due = int(first)
  end
end
return { redis.call('HGET', META, 'namespace'), now, promoted, taken_over, next_due, 0 }
