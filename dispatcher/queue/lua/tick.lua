-- What any instance does for all, about once a second: joins (group, queues, heartbeat),
-- promotes what is due, ends what expired, takes over what lapsed, gives up what is lost,
-- forgets instances that are gone.
-- ARGV: instance, incarnation, info ('' leaves), lease_ms, group, namespace to use if there is
--   none, source, daemon ('' while it does not answer), limit, forget_ms, the operator's limits as
--   JSON, then the queues this instance serves.
-- Returns {verdict, namespace, now, promoted, taken_over, expired, lost, poisoned, next_due, unusable},
--   next_due '' if nothing is scheduled, unusable the queues whose keys hold something else. With a
--   verdict other than `ok` nothing was done: `rival`, a living instance has the same name;
--   `source`, the queues are of the other kind.

local instance, incarnation, info, lease, group = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local source, daemon, limit, forget = ARGV[7], ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])
local FIRST_QUEUE = 12
local STEP = 1000 -- milliseconds a clock may be set back without anybody minding
local INSTANCES = BASE .. 'meta:instances'
local INCARNATIONS = BASE .. 'meta:incarnations'
local SEEN = BASE .. 'meta:seen'
local now = now_ms()

local function ensure_group(queue)
  if source ~= 'redis-stream' or not is_usable(queue) then
    return
  end
  local reply = redis.pcall('XGROUP', 'CREATE', stream_of(queue), group, '0', 'MKSTREAM')
  if reply.err and not string.find(reply.err, 'BUSYGROUP', 1, true) then
    error(reply.err)
  end
end

-- A consumer is deleted only when nothing is pending on it: what is could never be reached again.
-- As long as something is, the name is kept in mind, to be looked at again.
local function forget_instance(name)
  local is_clean = true
  for _, queue in ipairs(redis.call('SMEMBERS', QUEUES)) do
    local pending = redis.pcall('XPENDING', stream_of(queue), group, '-', '+', 1, name)
    if not pending.err and #pending == 0 then
      redis.call('XGROUP', 'DELCONSUMER', stream_of(queue), group, name)
    elseif not pending.err then
      is_clean = false
    end
  end
  redis.call('HDEL', INSTANCES, name)
  redis.call('HDEL', INCARNATIONS, name)
  redis.call('HDEL', SUSPECTS, name)
  if is_clean then
    redis.call('ZREM', SEEN, name)
  end
  redis.call('DEL', BASE .. 'control:' .. name)
end

-- Whether time has run on without a gap. After a gap (a paused Redis, a jumped clock) nobody
-- had the chance to renew, so nothing is taken over until everybody has had it.
local function continuous()
  local last = tonumber(redis.call('HGET', META, 'last_tick') or now)
  redis.call('HSET', META, 'last_tick', int(now))
  local longest = tonumber(redis.call('HGET', META, 'longest_lease') or lease)
  local set_back = now < last - STEP
  if set_back then
    for _, id in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do
      redis.call('ZADD', LEASES, int(now + longest), id)
    end
    for _, name in ipairs(redis.call('ZRANGE', DAEMONS, 0, -1)) do
      redis.call('ZADD', DAEMONS, int(now), name)
    end
  end
  if set_back or now - last > lease / 2 then
    redis.call('HSET', META, 'calm_until', int(now + longest), 'gap_ended', int(now))
  end
  local calm_until = tonumber(redis.call('HGET', META, 'calm_until') or 0)
  return now >= calm_until or calm_until > now + longest
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

-- Ends what nobody has started in time. What is held, or may have a container, is its holder's
-- affair, and is watched again when it comes back.
local function expire()
  local expired = 0
  -- To take one out of a list, the list is looked through.
  local most = are_lists() and 25 or limit
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', EXPIRES, '-inf', int(now), 'LIMIT', 0, most)) do
    redis.call('ZREM', EXPIRES, id)
    local r = fields_of(id, 'state', 'owner', 'daemon', 'expires')
    if r[1] ~= '' and not ENDED[r[1]] and r[2] == '' and r[3] == '' then
      withdraw(id)
      close(id, { state = 'failed', reason = 'expired', message = 'expires_at ' .. rfc3339(r[4]) .. ' has passed' })
      expired = expired + 1
    end
  end
  return expired
end

-- Whether the instance that a task was given to lives, and does not know that it has it: the
-- reply that gave it was lost.
local function lives(owner)
  local name, its_incarnation = string.match(owner, '^(.*)/([^/]*)/[^/]*$')
  local seen = tonumber(redis.call('ZSCORE', SEEN, name) or 0)
  return redis.call('HGET', INCARNATIONS, name) == its_incarnation and now - seen < lease / 2
end

-- Counts owners that fell silent soon after they had taken a task; one that was held for long
-- before is no suspect. Returns whether it is over the operator's limit.
local function is_poison(id, owner, lease_end, taken)
  local died = tonumber(lease_end) - lease -- when its owner renewed for the last time
  if died - tonumber(taken ~= '' and taken or 0) >= 2 * lease then
    redis.call('HSET', record_key(id), 'deaths', '0')
    return false
  end
  return not lives(owner) and redis.call('HINCRBY', record_key(id), 'deaths', 1) >= limits().max_deliveries
end

local function take_over()
  local lapsed = redis.call('ZRANGEBYSCORE', LEASES, '-inf', int(now), 'WITHSCORES', 'LIMIT', 0, limit)
  local poisoned = 0
  for i = 1, #lapsed, 2 do
    local id = lapsed[i]
    local r = fields_of(id, 'owner', 'taken', 'cancel', 'daemon')
    if r[1] == '' then
      redis.call('ZREM', LEASES, id) -- somebody deleted its record
    else
      disown(id, '')
      redis.call('HINCRBY', record_key(id), 'takeovers', 1)
      if is_poison(id, r[1], lapsed[i + 1], r[2]) then
        -- A container it may have is removed by the reconciler on its daemon.
        local message = 'its dispatcher died ' .. limits().max_deliveries .. ' times soon after taking it'
        if r[3] ~= '' then
          close(id, { state = 'cancelled', message = 'cancelled; ' .. message })
        else
          close(id, { state = 'failed', reason = 'poison', message = message, dead = true })
        end
        poisoned = poisoned + 1
      elseif r[3] ~= '' and r[4] == '' then
        close(id, { state = 'cancelled', message = 'cancelled before it started' })
      else
        watch_expiry(id)
        put_back(id)
      end
    end
  end
  return #lapsed / 2, poisoned
end

-- Gives up the attempts whose containers nobody can see any more: no instance has been on
-- their daemon for as long as the operator allows.
local function lose(id, absence, limit_of_infra)
  local r = fields_of(id, 'state', 'owner', 'cancel', 'infra', 'daemon', 'started')
  if r[1] == '' or ENDED[r[1]] or r[2] ~= '' then
    return 0
  end
  local message = 'no instance has been on its daemon ' .. r[5] .. ' for ' .. int(absence / 1000) .. ' s'
  redis.call('HDEL', record_key(id), 'daemon', 'container', 'cause', 'begun')
  if r[3] ~= '' then
    close(id, { state = 'cancelled', started = r[6], message = 'cancelled; ' .. message })
  elseif tonumber(r[4] ~= '' and r[4] or 0) + 1 < limit_of_infra then
    redis.call('HINCRBY', record_key(id), 'infra', 1)
    redis.call('HINCRBY', record_key(id), 'attempt', 1)
    redis.call('HSET', record_key(id), 'reason', 'lost', 'message', message, 'exit_code', '')
    watch_expiry(id)
    put_back(id)
  else
    close(id, { state = 'failed', reason = 'lost', started = r[6], message = message, dead = true })
  end
  return 1
end

local function give_up_lost()
  local limit_of = limits()
  local lost = 0
  -- Absence is counted from when it could be noticed: not while nothing ran at all.
  local gap_ended = tonumber(redis.call('HGET', META, 'gap_ended') or 0)
  if now - gap_ended < limit_of.lost_after then
    return 0
  end
  local before = int(now - limit_of.lost_after)
  local absent = redis.call('ZRANGEBYSCORE', DAEMONS, '-inf', before, 'WITHSCORES', 'LIMIT', 0, limit)
  for i = 1, #absent, 2 do
    for _, id in ipairs(redis.call('ZRANGE', inbox_of(absent[i]), 0, limit - 1)) do
      redis.call('ZREM', inbox_of(absent[i]), id)
      lost = lost + lose(id, now - absent[i + 1], limit_of.infra_max_attempts)
    end
    if redis.call('EXISTS', inbox_of(absent[i])) == 0 then
      redis.call('ZREM', DAEMONS, absent[i])
    end
  end
  return lost
end

-- Two of one name would read each other's messages and speak for each other's tasks.
local function rival()
  local other = redis.call('HGET', INCARNATIONS, instance)
  local seen = tonumber(redis.call('ZSCORE', SEEN, instance) or 0)
  -- Seen in the future is no sign of life either: the clock has been set back since.
  return other and other ~= incarnation and math.abs(now - seen) < lease
end

-- Calls `visit` with the task of each entry of a stream that refers to one as `append` wrote it;
-- false if there is any other entry.
local function each_reference(key, visit)
  local first = '-'
  repeat
    local entries = redis.call('XRANGE', key, first, '+', 'COUNT', limit)
    for _, entry in ipairs(entries) do
      local fields = entry[2]
      if fields[1] ~= 'ref' or fields_of(fields[2], 'entry')[1] ~= entry[1] then
        return false
      end
      visit(fields[2])
      first = '(' .. entry[1]
    end
  until #entries == 0
  return true
end

-- What had its entry in a queue of the other kind has none any more, and goes ahead.
local function put_back_all_waiting()
  local count = redis.call('ZCARD', OPEN)
  for first = 0, count - 1, limit do
    for _, id in ipairs(redis.call('ZRANGE', OPEN, first, first + limit - 1)) do
      local r = fields_of(id, 'state', 'owner', 'entry')
      if r[1] == 'queued' and r[2] == '' and r[3] ~= '' then
        put_back(id)
      end
    end
  end
end

local function ignore() end

-- Makes the queues lists or streams, as this instance is told; false if they hold tasks as
-- something else, or others live by that. While nobody had told it, clients' tasks went to streams.
local function agree_on_source()
  local before = redis.call('HGET', META, 'source')
  if before == source then
    return true
  elseif before and redis.call('ZCOUNT', SEEN, '(' .. int(now - lease), '+inf') > 0 then
    return false
  end
  local queues = all_queues()
  for i = FIRST_QUEUE, #ARGV do
    queues[#queues + 1] = ARGV[i]
  end
  local type_of = source == 'redis-list' and 'list' or 'stream'
  for pass = 1, 2 do -- nothing is changed unless all can be
    for _, queue in ipairs(queues) do
      local key = stream_of(queue)
      local found = redis.call('TYPE', key).ok
      if found == 'stream' and type_of == 'list' then
        if pass == 2 then
          each_reference(key, put_back)
          redis.call('DEL', key)
        elseif redis.call('XLEN', key) > 0 and (before or not each_reference(key, ignore)) then
          return false
        end
      elseif found ~= 'none' and found ~= type_of then
        return false
      end
    end
  end
  redis.call('HSET', META, 'source', source)
  if before then
    for _, queue in ipairs(queues) do
      redis.call('HDEL', META, 'references:' .. queue)
    end
    put_back_all_waiting()
  end
  return true
end

local function join()
  for i = FIRST_QUEUE, #ARGV do
    redis.call('SADD', QUEUES, ARGV[i])
    ensure_group(ARGV[i])
  end
  for name, value in pairs(cjson.decode(ARGV[11])) do
    redis.call('HSET', META, name, int(value))
  end
  local longest = tonumber(redis.call('HGET', META, 'longest_lease') or 0)
  redis.call('HSET', META, 'longest_lease', int(math.max(longest, lease)))
  redis.call('HSET', INSTANCES, instance, info)
  redis.call('HSET', INCARNATIONS, instance, incarnation)
  redis.call('ZADD', SEEN, int(now), instance)
  if daemon ~= '' then
    redis.call('ZADD', DAEMONS, int(now), daemon)
  end
end

local function refusal(verdict)
  return { verdict, redis.call('HGET', META, 'namespace'), now, 0, 0, 0, 0, 0, '', {} }
end

go_on_without_memory()
redis.call('HSETNX', META, 'namespace', ARGV[6])
if rival() then
  return refusal('rival')
elseif info == '' then
  forget_instance(instance)
elseif not agree_on_source() then
  return refusal('source')
else
  join()
end
local taken_over, poisoned, lost = 0, 0, 0
if continuous() then
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', SEEN, '-inf', int(now - forget), 'LIMIT', 0, limit)) do
    forget_instance(name)
  end
  taken_over, poisoned = take_over()
  lost = give_up_lost()
end
local expired = expire()
local promoted, next_due, unusable = 0, '', {}
for _, queue in ipairs(all_queues()) do
  if not is_usable(queue) then
    unusable[#unusable + 1] = queue
  end
  promoted = promoted + promote(queue)
  local first = tonumber(redis.call('ZRANGE', due_of(queue), 0, 0, 'WITHSCORES')[2])
  if first and (next_due == '' or first < tonumber(next_due)) then
    next_due = int(first)
  end
end
return { 'ok', redis.call('HGET', META, 'namespace'), now, promoted, taken_over, expired, lost, poisoned, next_due, unusable }
